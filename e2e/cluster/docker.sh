# shellcheck shell=bash
# The docker that kind's nodes run in: one that answers already, or a dockerd of our own.

# What our dockerd, and the kubelets in its containers, change outside of their own directories.
HOST_SYSCTLS=(
  net.ipv4.ip_forward net.ipv4.conf.all.forwarding net.ipv4.conf.default.forwarding
  net.ipv6.conf.all.forwarding net.ipv6.conf.default.forwarding
  net.bridge.bridge-nf-call-iptables net.bridge.bridge-nf-call-ip6tables net.ipv4.conf.all.route_localnet
  vm.overcommit_memory kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes
  fs.inotify.max_user_instances fs.inotify.max_user_watches
)
HOST_PATHS=(/lib/modules /etc/docker/key.json /etc/docker /run/docker /run/containerd /opt/containerd /var/lib/docker /var/lib/kubelet)

docker_is_ours() { [[ -e $STATE/host/ours ]]; }

# Sets DOCKER_HOST where the docker in use is not the default one.
docker_choose() {
  if ! docker_is_ours && timeout 10 docker version >/dev/null 2>&1; then return; fi
  export DOCKER_HOST=unix://$DOCKER_SOCKET
}

docker_answers() { timeout 10 docker version >/dev/null 2>&1; }

docker_start() {
  need docker:docker.io
  lock "$STATE/docker.lock"
  docker_choose
  if ! docker_answers; then
    [[ $EUID -eq 0 ]] || fail "no docker answers, and only root can start one"
    # A machine may have the client alone.
    need dockerd:docker.io tini:tini iptables:iptables ip:iproute2 jq:jq
    docker_undo
    docker_remember_host
    docker_launch
  fi
  # More than two nodes need more inotify instances than many distributions allow to one user.
  if [[ $EUID -eq 0 && $(sysctl -n fs.inotify.max_user_instances) -lt 1024 ]]; then
    mkdir -p "$STATE/host"
    [[ -e $STATE/host/sysctls ]] || sysctl fs.inotify.max_user_instances >"$STATE/host/sysctls"
    quiet sysctl -w fs.inotify.max_user_instances=1024
  fi
  unlock
}

docker_remember_host() {
  local each host=$STATE/host.new
  rm -rf "$host"
  mkdir -p "$host"
  for each in "${HOST_SYSCTLS[@]}"; do
    sysctl "$each" 2>/dev/null || true
  done >"$host/sysctls"
  for each in "${HOST_PATHS[@]}"; do
    [[ -e $each ]] || echo "$each"
  done >"$host/absent-paths"
  for each in $(firewall_commands); do
    { "$each" -w -S FORWARD || echo "-P FORWARD ACCEPT"; } 2>/dev/null | sed -n 1p >"$host/$each-forward"
  done
  if command -v nft >/dev/null; then nft list tables 2>/dev/null | sort >"$host/nft-tables"; fi
  bridges >"$host/bridges"
  for each in $(cgroup_roots); do
    [[ -d $each/docker ]] || echo "$each/docker"
  done >"$host/absent-cgroups"
  touch "$host/ours"
  mv "$host" "$STATE/host"
}

docker_launch() {
  local runtime=() attempt
  if ! all_capabilities; then
    runtime=(--add-runtime "limited=$HERE/runc-limited" --default-runtime limited)
  fi
  [[ -d /lib/modules ]] || mkdir -p /lib/modules # kind mounts it into the nodes
  mkdir -p "$CACHE/docker"
  # Where PID 1 does not reap orphans, tini is the parent that containerd's shims end up with.
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin launch setsid tini -s -- dockerd \
    --host "unix://$DOCKER_SOCKET" --data-root "$CACHE/docker" --exec-root "$STATE/docker" --pidfile "$STATE/dockerd.pid" \
    "${runtime[@]}" >"$STATE/log/dockerd.log" 2>&1 </dev/null
  for attempt in {1..300}; do
    if docker_answers; then
      step "dockerd runs (process $(cat "$STATE/dockerd.pid"), its log is $STATE/log/dockerd.log)"
      return
    fi
    [[ $attempt -lt 20 ]] || kill -0 $! 2>/dev/null || break
    sleep 0.1
  done
  tail -n 20 "$STATE/log/dockerd.log" >&2
  fail "dockerd does not answer"
}

# Whether this process may hold every capability that the kernel knows.
all_capabilities() {
  local bounding
  bounding=$((16#$(awk '/^CapBnd/ { print $2 }' /proc/self/status)))
  ((bounding == (1 << ($(</proc/sys/kernel/cap_last_cap) + 1)) - 1))
}

bridges() {
  ip -o link show type bridge | awk -F': ' '$2 == "docker0" || $2 ~ /^br-[0-9a-f]{12}$/ { print $2 }' | sort
}

cgroup_roots() {
  awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/mounts
}

firewall_commands() {
  local each
  for each in iptables ip6tables; do
    if command -v "$each" >/dev/null; then echo "$each"; fi
  done
}

# Ends the dockerd that we started, unless containers still run in it, and undoes what it did.
docker_stop() {
  docker_is_ours || {
    sysctls_restore
    return 0
  }
  if docker_answers && [[ -n $(docker ps -aq) ]]; then
    step "dockerd stays: other containers run in it"
    return
  fi
  step "stopping dockerd"
  docker_undo
}

docker_undo() {
  local pid attempt each
  docker_is_ours || return 0
  pid=$(cat "$STATE/dockerd.pid" 2>/dev/null || true)
  if [[ -n $pid ]] && grep -qzFx -- "$CACHE/docker" "/proc/$pid/cmdline" 2>/dev/null; then
    kill "$pid"
    for attempt in {1..200}; do
      kill -0 "$pid" 2>/dev/null || break
      [[ $attempt -ne 150 ]] || kill -9 "$pid"
      sleep 0.1
    done
  fi
  # A dockerd that was killed leaves its containerd, the shims of its containers, and the containers.
  for each in $(pgrep -f -- "$STATE/docker/" || true); do
    case $(readlink "/proc/$each/exe" || true) in
      */containerd | */containerd-shim*) kill -9 "$each" 2>/dev/null || true ;;
    esac
  done
  while read -r each; do
    [[ ! -d $each ]] || find "$each" -name cgroup.procs -exec cat {} + | sort -u | xargs -r kill -9 2>/dev/null || true
  done <"$STATE/host/absent-cgroups"
  firewall_restore
  awk -v run="$STATE/docker/" -v data="$CACHE/docker/" 'index($2, run) == 1 || index($2, data) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount -l
  cgroups_remove
  sysctls_restore
  while read -r each; do paths_remove "$each"; done <"$STATE/host/absent-paths"
  rm -rf "$STATE/docker" "$STATE/dockerd.pid" "$DOCKER_SOCKET" "$STATE/host"
}

# Removes docker's chains, and of other chains only the rules that name docker's chains or bridges.
firewall_restore() {
  local command table rule chain each made
  mapfile -t made < <(bridges | comm -13 "$STATE/host/bridges" -)
  for command in $(firewall_commands); do
    for table in filter nat raw; do
      "$command" -w -t "$table" -S 2>/dev/null |
        grep -E "^-A (FORWARD|PREROUTING|OUTPUT|POSTROUTING) .*(DOCKER$(printf '|%s' "${made[@]}"))" | sed 's/^-A/-D/' |
        while read -r rule; do
          xargs "$command" -w -t "$table" <<<"$rule"
        done || true
      for chain in $("$command" -w -t "$table" -S 2>/dev/null | sed -n 's/^-N \(DOCKER.*\)/\1/p'); do
        "$command" -w -t "$table" -F "$chain"
      done
      for chain in $("$command" -w -t "$table" -S 2>/dev/null | sed -n 's/^-N \(DOCKER.*\)/\1/p'); do
        "$command" -w -t "$table" -X "$chain"
      done
    done
    xargs "$command" -w <"$STATE/host/$command-forward" 2>/dev/null || true
  done
  for each in "${made[@]}"; do ip link delete "$each"; done
  firewall_drop_empty_tables
}

# iptables makes a table the first time it is asked for it; an empty one that was not there goes again.
firewall_drop_empty_tables() {
  local table rules
  [[ -e $STATE/host/nft-tables ]] || return 0
  nft list tables | sort | comm -13 "$STATE/host/nft-tables" - | while read -r _ table; do
    # shellcheck disable=SC2086 # family and name are two words
    rules=$(nft list table $table) || continue
    # shellcheck disable=SC2086 # likewise
    grep -qE '^\s+(ip|ip6|meta|ct|iif|oif|jump|counter|xt|tcp|udp)\b' <<<"$rules" || nft delete table $table
  done
}

# paths_remove DIRECTORY: what daemons leave behind in places that are not theirs alone: sockets that
# nobody listens on any more, docker's key, empty directories. Anything else has another owner by now.
paths_remove() {
  local socket
  if [[ $1 == */key.json ]]; then rm -f "$1"; fi
  [[ -d $1 ]] || return 0
  find "$1" -xdev -type s -print | while read -r socket; do
    grep -qF " $socket" /proc/net/unix || rm -f "$socket"
  done
  find "$1" -xdev -depth -type d -empty -delete
}

cgroups_remove() {
  local each attempt
  while read -r each; do
    for attempt in 1 2 3 4 5; do
      [[ -d $each ]] || break
      find "$each" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
    done
  done <"$STATE/host/absent-cgroups"
}

sysctls_restore() {
  [[ -e $STATE/host/sysctls ]] || return 0
  sysctl -q -p "$STATE/host/sysctls" >/dev/null 2>&1 || true
  rm -f "$STATE/host/sysctls"
}
