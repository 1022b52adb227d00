# shellcheck shell=bash
# Builds the programs that the modules below tools/ pin: kind and kubectl for the machine, the rest for
# the node image. Two modules, because runc and containerd need newer container libraries than the ones
# that Kubernetes still compiles with.

TOOLS_SOURCE=$HERE/tools

tools_version() { # MODULE
  awk -v module="$1" '$1 == "require" { $0 = substr($0, 9) } $1 == module && $2 ~ /^v/ { print $2; exit }' "$TOOLS_SOURCE"/*/go.mod
}

tools_key() {
  find "$TOOLS_SOURCE" -type f -print0 | sort -z | xargs -0 cat "$HERE/tools.sh" | digest "$(go env GOVERSION GOARCH)" /dev/stdin
}

# PROGRAM MODULE PACKAGE [TAGS]
tools_programs() {
  cat <<'PROGRAMS'
kind node sigs.k8s.io/kind
kubernetes kubernetes .
etcd node go.etcd.io/etcd/server/v3
coredns node ./coredns
containerd node github.com/containerd/containerd/v2/cmd/containerd no_btrfs,no_devmapper,no_zfs
containerd-shim-runc-v2 node github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2
ctr node github.com/containerd/containerd/v2/cmd/ctr
runc node github.com/opencontainers/runc seccomp
crictl node sigs.k8s.io/cri-tools/cmd/crictl
critest node sigs.k8s.io/cri-tools/cmd/critest
host-local node github.com/containernetworking/plugins/plugins/ipam/host-local
loopback node github.com/containernetworking/plugins/plugins/main/loopback
ptp node github.com/containernetworking/plugins/plugins/main/ptp
portmap node github.com/containernetworking/plugins/plugins/meta/portmap
PROGRAMS
}

tools_link_flags() { # PROGRAM
  local version package flags="-s -w"
  case $1 in
    kubernetes)
      # Clients and servers compare these; a build without them calls itself v0.0.0.
      version=$(tools_version k8s.io/kubernetes)
      for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        flags+=" -X $package.gitVersion=$version -X $package.gitMajor=1 -X $package.gitMinor=$(cut -d. -f2 <<<"$version")"
        flags+=" -X $package.gitTreeState=clean -X $package.buildDate=1970-01-01T00:00:00Z"
      done
      ;;
    containerd | containerd-shim-runc-v2 | ctr)
      flags+=" -X github.com/containerd/containerd/v2/version.Version=$(tools_version github.com/containerd/containerd/v2)"
      ;;
    runc) flags+=" -X main.version=$(tools_version github.com/opencontainers/runc | tr -d v)" ;;
    crictl) flags+=" -X sigs.k8s.io/cri-tools/pkg/version.Version=$(tools_version sigs.k8s.io/cri-tools)" ;;
  esac
  printf '%s' "$flags"
}

tools_need_go() {
  command -v go >/dev/null || fail "Go is needed to build the cluster's tools (go.mod names the version)"
}

# tools [PROGRAM...]: sets TOOLS to a directory that has the named programs, or all.
tools() {
  local program module package tags cgo build wanted=" $* " previous
  tools_need_go
  TOOLS=$CACHE/tools/$(tools_key)
  [[ $wanted == "  " ]] && wanted=" $(tools_programs | cut -d' ' -f1 | tr '\n' ' ') "
  mkdir -p "$CACHE/tools"
  lock "$CACHE/tools.lock"
  if [[ ! -d $TOOLS ]]; then
    # go build leaves a program alone that is current already: with the previous ones at hand, a change
    # of one version links again only what it touches.
    previous=$(find "$CACHE/tools" -mindepth 1 -maxdepth 1 -type d ! -name '*.new' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
    rm -rf "$TOOLS.new"
    mkdir -p "$TOOLS.new"
    [[ -z $previous ]] || cp -a "$previous/." "$TOOLS.new/"
    rm -f "$TOOLS.new"/*.done
    mv "$TOOLS.new" "$TOOLS"
  fi
  while read -r program module package tags; do
    [[ $wanted == *" $program "* && ! -e $TOOLS/$program.done ]] || continue
    cgo=0
    if [[ $program == runc ]]; then
      # runc enters namespaces by C code before Go's runtime starts.
      need gcc:gcc pkg-config:pkg-config /usr/lib/*/pkgconfig/libseccomp.pc:libseccomp-dev
      cgo=1
    fi
    step "building $program"
    build=(build)
    # Its tests are the program.
    [[ $program != critest ]] || build=(test -c -vet=off)
    (cd "$TOOLS_SOURCE/$module" && CGO_ENABLED=$cgo quiet nice go "${build[@]}" -buildvcs=false -mod=readonly -tags "$tags" -ldflags "$(tools_link_flags "$program")" -o "$TOOLS/$program" "$package")
    touch "$TOOLS/$program.done"
  done < <(tools_programs)
  if [[ -e $TOOLS/kubernetes ]]; then
    for program in kubectl kubeadm; do ln -sf kubernetes "$TOOLS/$program"; done
  fi
  touch "$TOOLS"
  unlock
}
