#!/bin/sh
# The entry point of the container: runs warmfork with the capabilities that its criu needs, where the container has them.
# A container's user that is not root gets none by itself; see the Dockerfile.
set -eu

if [ "$(id -u)" -eq 0 ]; then exec warmfork "$@"; fi

helper=/usr/local/lib/warmfork/setpriv
capabilities=+checkpoint_restore,+sys_ptrace,+sys_admin,+setpcap
if "$helper" --inh-caps="$capabilities" --ambient-caps="$capabilities" -- true 2>/dev/null; then
  exec "$helper" --inh-caps="$capabilities" --ambient-caps="$capabilities" -- warmfork "$@"
fi
echo 'warmfork: this container may not use CRIU. Start it with --cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE' \
  '--cap-add SYS_ADMIN, and without no-new-privileges.' >&2
exec warmfork "$@"
