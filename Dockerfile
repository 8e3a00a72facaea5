# An image with warmfork and a CRIU that suits kernels from 5.9 up to the newest, for programs that are forked in a
# container. Nothing is downloaded but packages of Debian and of npm.
#
#     docker build -t warmfork .
#     docker run --rm --cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE --cap-add SYS_ADMIN warmfork doctor
#
# An application brings itself, and says what ready means:
#
#     FROM warmfork
#     COPY --chown=warmfork:warmfork app /app
#     WORKDIR /app
#     CMD ["run", "--ready-output", "listening", "--", "node", "app.js"]
#
# What the container must be given, and what for:
#     CAP_CHECKPOINT_RESTORE  criu chooses process ids and restores what else only the kernel sets
#     CAP_SYS_PTRACE          criu stops and reads the template
#     CAP_SYS_ADMIN           criu makes time namespaces and reads what /proc shows to no other; it also lets the system
#                             calls that criu needs through Docker's seccomp profile
#     CAP_SETPCAP             criu sets the capability sets of a child; Docker gives it by default
#     CAP_NET_ADMIN           optional: for templates that hold open TCP connections at their checkpoint
# Where AppArmor confines containers, add `--security-opt apparmor=unconfined`. With `--security-opt no-new-privileges`
# a user that is not root cannot have capabilities at all: run as root then. Without the capabilities the image works too,
# by cold starts, and says so.
#
# The steps of this file can be tried without Docker, in a chroot: `npx tsx test/dockerfile-steps.ts` (as root).

FROM node:20-bookworm-slim AS build
RUN apt-get update \
  && apt-get install --yes --no-install-recommends gcc libc6-dev \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY package.json package-lock.json .npmrc ./
RUN npm ci
COPY tsconfig.json tsconfig.build.json README.md LICENSE ./
COPY scripts scripts
COPY docs docs
COPY src src
# `npm pack` compiles and builds the native parts first; what it packs is what npm users get.
RUN mkdir /pack && npm pack --pack-destination /pack

FROM node:20-bookworm-slim
# tini is PID 1. The processes of a child whose parent has ended become children of PID 1, and PID 1 has to read their exit
# statuses. Node reads those of the children that it has started itself and of no others: as PID 1 it would collect zombies
# until the ids run out. tini does this and passes signals on, and nothing else; Debian maintains it.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends libcap2-bin tini \
  && rm -rf /var/lib/apt/lists/*

COPY --from=build /pack/ /pack/
RUN npm install --global --no-audit --no-fund /pack/warmfork-*.tgz \
  && npm cache clean --force \
  && rm -rf /pack

# Where all users of the image find it. The kernel is named, since the image is built on another one than it runs on.
RUN node --input-type=module --eval "\
  import { installCriu } from '/usr/local/lib/node_modules/warmfork/dist/engines/criu/install.js'; \
  await installCriu({ prefix: '/usr/local/lib/warmfork/criu', kernelRelease: '6.16', onProgress: console.log })"

# Not root, and not with capabilities either until the entry point takes them: by a copy of setpriv that carries them as file
# capabilities and that this group alone may run. Programs that the supervisor runs as the same user are of that group too.
# To keep them apart, run the container as root and the workers as somebody else: `--user root`, `run --user node`.
RUN groupadd --system --gid 10001 warmfork \
  && useradd --system --uid 10001 --gid warmfork --create-home --shell /usr/sbin/nologin warmfork \
  && install -d -o warmfork -g warmfork -m 0700 /var/lib/warmfork /run/user /run/user/10001 \
  && install -o root -g warmfork -m 0750 /usr/bin/setpriv /usr/local/lib/warmfork/setpriv \
  && setcap cap_checkpoint_restore,cap_sys_ptrace,cap_sys_admin,cap_setpcap=p /usr/local/lib/warmfork/setpriv
COPY --chmod=0755 scripts/container-entrypoint.sh /usr/local/lib/warmfork/entrypoint

ENV WARMFORK_STORE=/var/lib/warmfork \
  XDG_RUNTIME_DIR=/run/user/10001
# The memory of templates lies here: a volume keeps it out of the layers of the container.
VOLUME ["/var/lib/warmfork"]
USER warmfork
WORKDIR /home/warmfork
ENTRYPOINT ["tini", "--", "/usr/local/lib/warmfork/entrypoint"]
CMD ["doctor"]
