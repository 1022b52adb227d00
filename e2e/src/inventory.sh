# Lines of what the runtime can leave on a node: one thing a line, named so that it is the same the next time.
for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    */containerd-shim-sock-v1\ *) echo "shim ${name##*-id }" ;;
    holder*) echo "holder ${each#/proc/}" ;;
    python3\ */opt/sock/python/*) echo "python ${each#/proc/}" ;;
  esac
done
awk '$2 ~ "^/(run|var)/" && $2 !~ "^/var/lib/kubelet/pods" { print "mount", $2 }' /proc/mounts | sort -u
awk '$2 ~ "^/var/lib/kubelet/pods" { print "mount", $2 }' /proc/mounts | sort -u
find /sys/fs/cgroup -type d \( -name '*pod*' -o -name 'leaf-*' -o -name 'cri-containerd*' -o -name '*holder*' -o -name '*sock*' \) 2>/dev/null | sed 's/^/cgroup /'
find /run/sock /var/lib/sock -mindepth 2 -maxdepth 4 2>/dev/null | sed 's/^/file /'
find /run/containerd/io.containerd.runtime.v2.task /run/containerd/s -mindepth 1 -maxdepth 2 2>/dev/null | sed 's/^/file /'
ls /var/run/netns 2>/dev/null | sed 's/^/netns /'
ip -o link show type veth | sed 's/^[0-9]*: \([^@:]*\).*/veth \1/'
ls -1 /dev/shm | sed 's/^/shm /'
systemctl list-units --type=scope --plain --no-legend 'cri-containerd-*' | awk '{ print "scope", $1 }'
