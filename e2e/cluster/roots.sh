# shellcheck shell=bash
# Root file systems that images start from: a minimal Debian, a busybox.

# debian OUT.tar SUITE PACKAGE,...: a minimal Debian as a tar.
debian() {
  need mmdebstrap:mmdebstrap
  # A mirror that was copied a while ago has an index that is past its date; its signature counts all the same.
  quiet nice mmdebstrap --variant=minbase --format=tar --include="$3" --aptopt='Acquire::Check-Valid-Until "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    "$2" "$1.new"
  mv "$1.new" "$1"
}

# busybox_tree DIRECTORY: busybox with all its applets.
busybox_tree() {
  local applet
  mkdir -p "$1"/{bin,sbin,dev,etc,home,proc,root,run,sys,tmp,usr/bin,usr/sbin,var}
  chmod 1777 "$1/tmp"
  install -m 755 /bin/busybox "$1/bin/busybox"
  for applet in $(/bin/busybox --list-full); do
    mkdir -p "$1/$(dirname "$applet")"
    [[ -e $1/$applet || -L $1/$applet ]] || ln -s /bin/busybox "$1/$applet"
  done
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n' >"$1/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$1/etc/group"
}
