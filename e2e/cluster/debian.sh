# shellcheck shell=bash
# Programs of other Debian releases than the nodes'.

# from_debian OUT.tar SUITE PACKAGE,...: the files of packages and of all that they need, nothing configured.
from_debian() {
  need mmdebstrap:mmdebstrap
  # A mirror that was copied a while ago has an index that is past its date; its signature counts all the same.
  quiet nice mmdebstrap --variant=extract --include="$3" --aptopt='Acquire::Check-Valid-Until "false"' \
    "$2" "$1" "deb http://deb.debian.org/debian $2 main"
}
