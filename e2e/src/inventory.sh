# shellcheck shell=sh
# Lines of what the runtime can leave on a node: one thing a line, its kind first, named so that it is the same the next time.
# Where several things have one name each gets a number: fewer of them are lines that are missing, more are new lines.

number() {
  awk '{ print $0, ++seen[$0] }'
}

# Every process by its cgroup and name, but for those of this session, who only look. Of the hierarchies of version 1 it is the
# one that counts processes.
grep -Es '^[0-9]+ \(|^0::|:pids:' /proc/[0-9]*/stat /proc/[0-9]*/cgroup | awk -v self=$$ '
  {
    split($0, parts, "/")
    pid = parts[3]
    line = substr($0, index($0, ":") + 1)
  }
  $0 ~ "^/proc/[0-9]+/stat:" {
    name[pid] = line
    sub(/^[0-9]+ \(/, "", name[pid])
    # The name may hold anything, a parenthesis too; what follows the last one are state, parent, group and session.
    rest = line
    sub(/.*\) /, "", rest)
    sub(/\) [^)]*$/, "", name[pid])
    gsub(/ /, "_", name[pid])
    split(rest, fields, " ")
    session[pid] = fields[4]
    # PF_KTHREAD (linux/sched.h): a machine of its own shows the threads of its kernel, which come and go.
    if (int(fields[7] / 2097152) % 2) delete name[pid]
  }
  $0 ~ "^/proc/[0-9]+/cgroup:" {
    path = line
    sub(/^[^:]*:[^:]*:/, "", path)
    if (line !~ /^0::/ || !(pid in cgroup)) cgroup[pid] = path
  }
  END {
    for (pid in name) if (session[pid] != session[self]) {
      # The name of a file in memory is that of the program that runs from it.
      if (name[pid] ~ /^memfd:sock-hold/) kind = "holder"
      else if (name[pid] ~ /^python/) kind = "python"
      else kind = "process"
      print kind, cgroup[pid], name[pid]
    }
  }' | number

for each in /proc/[0-9]*; do
  name=$(tr '\0' ' ' 2>/dev/null <"$each/cmdline") || continue
  case $name in
    */containerd-shim-sock-v1\ *) echo "shim ${name##*-id }" ;;
  esac
done

# Network namespaces, also those that only an open file or a mount keeps, by their inode; and what listens in each, or is bound
# to a name or a port. The kernel chooses ports of a range, others each time: those are told apart by number alone. Sockets of
# established connections come and go with clients.
range=$(tr '\t' ' ' </proc/sys/net/ipv4/ip_local_port_range)
{
  for each in /proc/[0-9]*/ns/net; do echo "$each $(readlink "$each")"; done
  find /proc/[0-9]*/fd -lname 'net:*' -printf '%p %l\n'
  for each in /var/run/netns/*; do [ -e "$each" ] && echo "$each net:[$(stat -c %i "$each")]"; done
} 2>/dev/null | awk 'NF == 2 && !seen[$2]++' | while read -r path namespace; do
  namespace=${namespace#net:[} namespace=${namespace%]}
  echo "namespace $namespace"
  # A process may have ended since, and its namespace with it.
  nsenter --net="$path" grep -H '' /proc/thread-self/net/unix /proc/thread-self/net/tcp /proc/thread-self/net/tcp6 \
    /proc/thread-self/net/udp /proc/thread-self/net/udp6 2>/dev/null |
    awk -v namespace="$namespace" -v first="${range% *}" -v last="${range#* }" '
      function decimal(hexadecimal, i, number) {
        for (i = 1; i <= length(hexadecimal); i++)
          number = 16 * number + index("0123456789ABCDEF", substr(hexadecimal, i, 1)) - 1
        return number
      }
      {
        sub(/:/, " ")
        protocol = $1
        sub(/.*\//, "", protocol)
      }
      # Streams that listen have a flag (__SO_ACCEPTCON); a datagram socket is bound if it has a name.
      protocol == "unix" && NF >= 9 && ($5 == "00010000" || $6 == "0002") { print "socket", namespace, protocol, $9 }
      # TCP_LISTEN is 0A; of UDP, 07 is not connected.
      protocol != "unix" && ($5 == "0A" || protocol ~ /^udp/ && $5 == "07") {
        split($3, address, ":")
        port = decimal(address[2])
        print "socket", namespace, protocol, (port >= first && port <= last) ? "any" : port
      }'
done | number

awk '$2 ~ "^/(run|var)/" { print "mount", $2 }' /proc/mounts | sort -u
find /sys/fs/cgroup -type d \( -name '*pod*' -o -name 'leaf-*' -o -name 'cri-containerd*' -o -name '*holder*' -o -name '*sock*' \) 2>/dev/null | sed 's/^/cgroup /'
find /run/sock /var/lib/sock -mindepth 2 -maxdepth 4 2>/dev/null | sed 's/^/file /'
find /run/containerd/io.containerd.runtime.v2.task /run/containerd/s -mindepth 1 -maxdepth 2 2>/dev/null | sed 's/^/file /'
find /var/run/netns -mindepth 1 -printf 'netns %f\n' 2>/dev/null
ip -o link show type veth | sed 's/^[0-9]*: \([^@:]*\).*/veth \1/'
find /dev/shm -mindepth 1 -printf 'shm %P\n' 2>/dev/null
systemctl list-units --type=scope --plain --no-legend 'cri-containerd-*' | awk '{ print "scope", $1 }'
