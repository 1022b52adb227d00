# shellcheck shell=bash
# A kernel for guests, from Debian, with its modules.

# Sets KERNEL and GUEST_TREE, the directory that has its lib/modules.
guest_kernel() {
  need /sbin/depmod:kmod cpio:cpio
  GUEST_TREE=$CACHE/guest/tree
  KERNEL=$CACHE/guest/vmlinuz
  lock "$CACHE/guest.lock"
  if [[ ! -s $KERNEL || ! -d $GUEST_TREE ]]; then
    step "taking a kernel for the guest from Debian"
    local work package
    rm -rf "$CACHE/guest"
    mkdir -p "$CACHE/guest"
    work=$(mktemp -d)
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | tail -n 1)
    (cd "$work" && apt-get download -qq "$package" 2>/dev/null && dpkg-deb -x ./*.deb tree)
    depmod -b "$work/tree" "$(ls "$work/tree/lib/modules")"
    mkdir "$work/only"
    mv "$work/tree/lib" "$work/only/"
    mv "$work/only" "$GUEST_TREE"
    mv "$work"/tree/boot/vmlinuz-* "$KERNEL"
    rm -rf "$work"
  fi
  unlock
}

# guest_modules DIRECTORY MODULE...: puts the modules, and those that they need, there, and prints their names in the order
# in which the kernel takes them. What is part of the kernel is none.
guest_modules() {
  local to=$1 file
  shift
  modprobe -d "$GUEST_TREE" -S "$(ls "$GUEST_TREE/lib/modules")" --show-depends -a "$@" |
    awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
    cp "$file" "$to/"
    basename "$file"
  done
}

# guest_initramfs DIRECTORY FILE
guest_initramfs() {
  (cd "$1" && find . | cpio --quiet -o -H newc | gzip -1) >"$2"
}
