# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that read this file use the variables
# What every script of the harness shares: where things are, how progress is told, locks, packages.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=${CLUSTER:-sock}
CACHE=${SOCK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sock}

# What a run changes on the machine is written below STATE before it is done. It lies where a reboot
# clears it, as the reboot undoes the changes too.
if [[ $EUID -eq 0 ]]; then
  STATE=/run/sock-cluster
else
  STATE=${XDG_RUNTIME_DIR:-/tmp}/sock-cluster-$EUID
fi
CLUSTER_STATE=$STATE/clusters/$NAME
LOG=$STATE/log/$NAME-$(basename "$0").log
DOCKER_SOCKET=$STATE/docker.sock

[[ $NAME =~ ^[a-z0-9][a-z0-9.-]*$ ]] || {
  echo "CLUSTER=$NAME: a name is made of lower case letters, digits, dots and dashes" >&2
  exit 2
}

# Prints a line about the step that begins, with the seconds since the script started.
step() {
  printf '%4ds  %s\n' "$SECONDS" "$*" >&2
  [[ ! -e $LOG ]] || printf '\n=== %s\n' "$*" >>"$LOG"
}

fail() {
  trap - ERR
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Opens the log of details, and shows its end if the script fails in the middle of something.
log_details() {
  mkdir -p "$STATE/log" "$CACHE"
  : >"$LOG"
  # shellcheck disable=SC2154 # the trap assigns it
  trap 'status=$?; printf "failed (exit code %s). The end of %s:\n" "$status" "$LOG" >&2; tail -n 25 "$LOG" | sed "s/^/  | /" >&2; exit "$status"' ERR
  set -E
}

# Runs a command with all its output in the log.
quiet() {
  printf '+ %s\n' "$*" >>"$LOG"
  "$@" >>"$LOG" 2>&1
}

# lock FILE: takes the lock until `unlock`, which gives back the last one taken, or the end of the script.
LOCKS=()
lock() {
  local descriptor
  mkdir -p "$(dirname "$1")"
  exec {descriptor}>"$1"
  LOCKS+=("$descriptor")
  flock --nonblock "$descriptor" && return
  step "another run holds $1; waiting for it"
  flock "$descriptor"
}

unlock() {
  local descriptor=${LOCKS[-1]}
  exec {descriptor}>&-
  unset 'LOCKS[-1]'
}

# Starts a daemon in the background, without the descriptors of our locks: it would go on to hold them.
launch() {
  (
    while [[ ${#LOCKS[@]} -gt 0 ]]; do unlock; done
    exec "$@"
  ) &
}

# need FILE:PACKAGE...: installs the Debian package where the file (a program on PATH, or a path) is missing.
need() {
  local pair missing=()
  for pair in "$@"; do
    if [[ $pair == /* ]]; then
      compgen -G "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    else
      command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
    fi
  done
  [[ ${#missing[@]} -gt 0 ]] || return 0
  if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
    fail "install these packages first, they are not here and cannot be installed from this account: ${missing[*]}"
  fi
  step "installing packages: ${missing[*]}"
  lock "$STATE/apt.lock"
  quiet apt-get install -y --no-install-recommends "${missing[@]}" ||
    { quiet apt-get update && quiet env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } ||
    fail "apt-get cannot install ${missing[*]}; the reason is in $LOG"
  unlock
}

# digest FILE-OR-TEXT...: a short name for everything that decides about a result.
digest() {
  local each
  for each in "$@"; do
    if [[ -f $each || -p $each ]]; then cat "$each"; else printf '%s\n' "$each"; fi
  done | sha256sum | cut -c1-16
}
