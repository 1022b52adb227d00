# shellcheck shell=bash
# The image of kind's nodes: the one that kind publishes where docker can pull it, else an equal one made
# of Debian packages, kind's own files and the programs of tools/.

NODE_PACKAGES=(systemd conntrack iptables nftables iproute2 ethtool util-linux mount kmod libseccomp2 e2fsprogs bash
  ca-certificates curl jq procps socat)
NODE_SUITE=bookworm

# Sets NODE_IMAGE, and makes sure that docker has it.
node_image() {
  NODE_IMAGE=${SOCK_NODE_IMAGE:-}
  if [[ -n $NODE_IMAGE ]]; then
    tools kind kubernetes
    return
  fi
  local key name published
  key=$(digest "$(tools_key)" "${NODE_PACKAGES[*]} $NODE_SUITE" "$HERE"/{node-image.sh,store.sh,roots.sh,archive.py} "$HERE"/node/*)
  name=sock/kind-node:$key
  if docker image inspect "$name" >/dev/null 2>&1; then
    tools kind kubernetes
    NODE_IMAGE=$name
    return
  fi
  tools_need_go
  published=$(sed -n 's/^const Image = "\(.*\)"$/\1/p' "$(kind_source)/pkg/apis/config/defaults/image.go")
  if docker image inspect "$published" >/dev/null 2>&1 || timeout 15 docker manifest inspect "$published" >/dev/null 2>&1; then
    tools kind kubernetes
    step "taking kind's node image $published"
    quiet docker pull "$published"
    NODE_IMAGE=$published
    return
  fi
  step "no container registry answers: the node image is built here"
  lock "$CACHE/node-image.lock"
  docker image inspect "$name" >/dev/null 2>&1 || node_image_build "$name" "$key"
  unlock
  NODE_IMAGE=$name
}

kind_source() {
  # Without the download, a module that nothing has been built of yet has no directory.
  (cd "$TOOLS_SOURCE/node" && quiet go mod download sigs.k8s.io/kind && go list -m -f '{{.Dir}}' sigs.k8s.io/kind)
}

node_image_build() { # NAME KEY
  local work base root
  need jq:jq gcc:gcc python3:python3 /bin/busybox:busybox-static ar:binutils
  base=$CACHE/debian/$(digest "$NODE_SUITE ${NODE_PACKAGES[*]}").tar
  mkdir -p "$CACHE/debian" "$CACHE/build"
  # What a killed run left; nobody else builds while we hold the lock.
  rm -rf "$CACHE"/build/node-*
  work=$CACHE/build/node-$2
  root=$work/root

  if [[ ! -s $base ]]; then
    step "unpacking Debian packages for the nodes"
    debian "$base" "$NODE_SUITE" "$(IFS=,; echo "${NODE_PACKAGES[*]}")"
  fi
  tools
  step "assembling the node's file system"
  mkdir -p "$root" "$work/images"
  tar -C "$root" -xpf "$base" --exclude='./dev/*'
  node_files "$root"
  step "packing the images of the control plane"
  node_archives "$root" "$work"
  node_store "$root" "$work"
  step "handing the node image to docker"
  node_import "$root" "$1"
  rm -rf "$work"
  # Images of earlier recipes; docker keeps those that a node still runs on.
  docker image ls --format '{{.Repository}}:{{.Tag}}' sock/kind-node | grep -vxF "$1" | xargs -r docker rmi >>"$LOG" 2>&1 || true
}

# What kind's base image does to a Debian, with the programs from tools/.
node_files() { # ROOT
  local root=$1 source program
  source=$(kind_source)/images/base/files
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
  mkdir -p "$root"/kind/{bin,manifests} "$root"/opt/cni/bin "$root/etc/kubernetes/manifests"
  install -m 755 "$source"/usr/local/bin/* "$root/usr/local/bin/"
  install -m 755 "$source"/kind/bin/* "$root/kind/bin/"
  (cd "$source" && find etc -type f -exec install -Dm 644 {} "$root/{}" \;)

  # Of systemd only what a node needs is started: no devices, no consoles, no timers.
  rm -f "$root"/lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service \
    "$root"/lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* \
    "$root"/lib/systemd/system/sockets.target.wants/*{udev,initctl}* "$root"/etc/systemd/system/*.wants/*
  echo 'ReadKMsg=no' >>"$root/etc/systemd/journald.conf"
  ln -sf /usr/lib/systemd/systemd "$root/sbin/init"
  quiet chroot "$root" systemctl enable kubelet.service containerd.service undo-mount-hacks.service
  quiet chroot "$root" systemctl mask systemd-binfmt.service

  install -m 755 "$TOOLS"/{containerd,containerd-shim-runc-v2,ctr,crictl} "$root/usr/local/bin/"
  install -Dm 755 "$TOOLS/runc" "$root/usr/local/sbin/runc"
  install -m 755 "$TOOLS"/{host-local,loopback,ptp,portmap} "$root/opt/cni/bin/"
  install -m 755 "$TOOLS/kubernetes" "$root/usr/bin/kubernetes"
  for program in kubeadm kubelet kubectl; do ln -s kubernetes "$root/usr/bin/$program"; done

  "$TOOLS/ctr" oci spec | jq '.hooks.createContainer += [{"path": "/kind/bin/mount-product-files.sh"}] | del(.process.rlimits)' \
    >"$root/etc/containerd/cri-base.json"
  tools_version k8s.io/kubernetes | tr -d '\n' >"$root/kind/version"
  install -m 644 "$HERE/node/network.yaml" "$root/kind/manifests/default-cni.yaml"
  install -m 644 "$HERE/node/storage.yaml" "$root/kind/manifests/default-storage.yaml"
}

# with_libraries ROOT TREE FILE...: copies programs of ROOT into TREE with the libraries they load.
with_libraries() {
  local root=$1 tree=$2 file library
  shift 2
  for file in "$@"; do
    install -Dm 755 "$root$file" "$tree$file"
    for library in $(chroot "$root" ldd "$file" 2>/dev/null | grep -o '/[^ ]*' || true); do
      [[ -e $tree$library ]] || install -Dm 755 "$root$library" "$tree$library"
    done
  done
}

node_archives() { # ROOT WORK
  local root=$1 work=$2 tree program names image kubernetes
  kubernetes=$(tools_version k8s.io/kubernetes)
  pack() { quiet "$HERE/archive.py" "$work/images/$1.tar" "$2" "$work/trees/$1" "${@:3}"; }
  required() { "$TOOLS/kubeadm" config images list --kubernetes-version "$kubernetes" 2>>"$LOG" | grep "/$1:"; }

  mkdir -p "$work"/trees/{pause,etcd/usr/local/bin,coredns,kubernetes/usr/local/bin}
  gcc -static -Os -s -o "$work/trees/pause/pause" "$HERE/node/pause.c"
  # containerd's configuration and kubeadm may name different ones.
  image=$(sed -n 's/^ *sandbox_image = "\(.*\)"/\1/p' "$root/etc/containerd/config.toml")
  names=$(printf '%s\n' "$image" "$(required pause)" | sort -u | paste -sd,)
  pack pause "$names" --entrypoint '["/pause"]'

  install -m 755 "$TOOLS/etcd" "$work/trees/etcd/usr/local/bin/"
  pack etcd "$(required etcd)" --cmd '["etcd"]'
  install -m 755 "$TOOLS/coredns" "$work/trees/coredns/"
  pack coredns "$(required coredns)" --entrypoint '["/coredns"]'

  # One image under the names of all Kubernetes' programs: their layer is stored once.
  tree=$work/trees/kubernetes
  busybox_tree "$tree"
  rm -f "$tree"/{bin,sbin,usr/sbin}/{ip,iptables*,ip6tables*}
  install -m 755 "$TOOLS/kubernetes" "$tree/usr/local/bin/"
  names=docker.io/sock/pod-network:local
  ln -s kubernetes "$tree/usr/local/bin/pod-network"
  for program in kube-apiserver kube-controller-manager kube-scheduler kube-proxy; do
    ln -s kubernetes "$tree/usr/local/bin/$program"
    names+=,$(required "$program")
  done
  (cd "$root" && ls /dev/null usr/lib/*/xtables/*.so) | sed -n 's#^usr#/usr#p' | {
    mapfile -t modules
    with_libraries "$root" "$tree" /usr/sbin/xtables-nft-multi /usr/sbin/nft /usr/sbin/conntrack /bin/ip "${modules[@]}"
  }
  for program in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    ln -s xtables-nft-multi "$tree/usr/sbin/$program"
  done
  for program in "/usr/sbin/iptables --version" "/usr/sbin/nft --version" "/bin/ip -V" "/usr/sbin/conntrack --version"; do
    # shellcheck disable=SC2086 # program and option are two words
    quiet chroot "$tree" $program
  done
  pack kubernetes "$names"
}

# Puts the images into the node's containerd store, not unpacked, pinned against garbage collection.
node_store() { # ROOT WORK
  local root=$1 work=$2 image
  rm -rf "$root/var/lib/containerd"
  store_open "$root" "$work" "$TOOLS/containerd" "$TOOLS/ctr"
  for image in "$work"/images/*.tar; do
    quiet store images import --label=io.cri-containerd.pinned=pinned --all-platforms --no-unpack --digests "$image"
  done
  store_close
}

node_import() { # ROOT NAME
  local unfinished=$2-unfinished
  tar -C "$1" --numeric-owner -c . | quiet docker import \
    --change 'ENV container=docker' \
    --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENTRYPOINT [ "/usr/local/bin/entrypoint", "/sbin/init" ]' - "$unfinished"
  # `docker import` refuses STOPSIGNAL; systemd ends in good order on this one only.
  printf 'FROM %s\nSTOPSIGNAL SIGRTMIN+3\n' "$unfinished" | DOCKER_BUILDKIT=0 quiet docker build -t "$2" -
  quiet docker rmi "$unfinished"
}
