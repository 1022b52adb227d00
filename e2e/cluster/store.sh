# shellcheck shell=bash
# The containerd store of a root file system that nothing runs in: this machine's fills it.

# store_open ROOT WORK CONTAINERD CTR: from here `store` is ctr on it, until `store_close`.
store_open() {
  local root=$1 work=$2 attempt
  STORE_CTR=$4
  STORE_SOCKET=$work/containerd.sock
  mkdir -p "$root/var/lib/containerd"
  cat >"$work/containerd.toml" <<TOML
version = 3
root = "$root/var/lib/containerd"
state = "$work/state"
disabled_plugins = ["io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri",
  "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs"]
[grpc]
  address = "$STORE_SOCKET"
[ttrpc]
  address = "$STORE_SOCKET.ttrpc"
TOML
  launch "$3" --config "$work/containerd.toml" >>"$LOG" 2>&1
  STORE_PID=$!
  # shellcheck disable=SC2064 # the process of now is meant
  trap "kill $STORE_PID 2>/dev/null || true" EXIT
  for attempt in {1..100}; do
    timeout 5 "$STORE_CTR" -a "$STORE_SOCKET" version >/dev/null 2>&1 && break
    [[ $attempt -lt 100 ]] || fail "containerd does not start; see $LOG"
    sleep 0.1
  done
}

store() {
  "$STORE_CTR" -a "$STORE_SOCKET" -n k8s.io "$@"
}

store_close() {
  kill "$STORE_PID"
  # What it had to write is written when it ends well.
  wait "$STORE_PID" || fail "containerd did not end well (exit code $?); see $LOG"
  trap - EXIT
}
