/** Checks of the kernel and of what it lets this process do. They know /proc, not criu. */
import { readFileSync } from 'node:fs'
import { capabilityRemedy, missingCapabilities } from '../engines/criu/rights.js'
import { capName, hasCapability, inheritedCapabilities } from '../linux/capabilities.js'
import { probeSystemCall, type SystemCallProbe } from '../linux/libc.js'
import { pidMax } from '../linux/proc.js'
import type { CheckContext, CheckResult } from './check.js'

/** Reads a file of /proc; empty where it is not there. */
function read(path: string): string {
  try {
    return readFileSync(path, 'latin1').trim()
  } catch {
    return ''
  }
}

function statusField(name: string): string {
  return new RegExp(`^${name}:\\s*(.*)$`, 'm').exec(read('/proc/self/status'))?.[1]?.trim() ?? ''
}

/**
 * 5.5 has clone3 with chosen ids, 5.6 pidfd_getfd and time namespaces, 5.9 CAP_CHECKPOINT_RESTORE, 6.11 PROCMAP_QUERY.
 */
export function judgeKernel(kernelRelease: string): CheckResult {
  const parts = /^(\d+)\.(\d+)/.exec(kernelRelease)
  const number = Number(parts?.[1] ?? 0) * 1000 + Number(parts?.[2] ?? 0)
  const base = { name: 'kernel', found: `Linux ${kernelRelease}` }
  if (number < 5006) {
    return {
      ...base,
      status: 'fail',
      cost: 'no fork: ids cannot be chosen and descriptors cannot be taken from another process (5.6)',
      remedy: 'Use Linux 5.9 or newer.',
    }
  }
  if (number < 5009) {
    return {
      ...base,
      status: 'warn',
      cost: 'only root can fork: CAP_CHECKPOINT_RESTORE came with 5.9',
      remedy: 'Use Linux 5.9 or newer.',
    }
  }
  if (number < 6011)
    return {
      ...base,
      status: 'ok',
      cost: 'freeing memory in a child reads /proc/self/maps (PROCMAP_QUERY came with 6.11)',
    }
  return { ...base, status: 'ok' }
}

export function checkKernel({ kernelRelease }: CheckContext): CheckResult {
  if (process.platform !== 'linux') {
    return {
      name: 'kernel',
      status: 'fail',
      found: process.platform,
      cost: 'no fork: CRIU is for Linux only',
      remedy: 'Use Linux, or the engine `spawn`.',
    }
  }
  return judgeKernel(kernelRelease)
}

export function checkArchitecture(): CheckResult {
  const base = { name: 'architecture', found: process.arch }
  if (process.arch === 'x64') return { ...base, status: 'ok' }
  return {
    ...base,
    status: 'fail',
    cost: 'no fork: images are edited with the registers of x64',
    remedy: 'Use an x64 machine, or the engine `spawn`.',
  }
}

/**
 * @param set what a criu that this process starts would have: the effective set for root, else the ambient one
 */
export function judgeCapabilities(uid: number, set: bigint): CheckResult {
  const who = uid === 0 ? 'root' : `user ${uid}`
  const missing = missingCapabilities(set)
  const name = 'capabilities'
  if (missing.length > 0) {
    const list = missing.map(capName).join(', ')
    return {
      name,
      status: 'fail',
      found: `${who} without ${list}`,
      cost: 'no fork: criu may not dump and restore',
      remedy: capabilityRemedy(uid, missing),
    }
  }
  const lost: string[] = []
  if (uid === 0 && !hasCapability(set, 'sys_resource'))
    lost.push('CAP_SYS_RESOURCE: criu must run as the user of the worker where that is not root')
  if (!hasCapability(set, 'net_admin')) lost.push('CAP_NET_ADMIN: programs with open TCP connections cannot be dumped')
  if (lost.length === 0) return { name, status: 'ok', found: `${who} with all that criu needs` }
  return { name, status: 'ok', found: `${who} with the four that criu needs`, cost: `without ${lost.join('; ')}` }
}

export function checkCapabilities(): CheckResult {
  const uid = process.geteuid?.() ?? -1
  return judgeCapabilities(uid, inheritedCapabilities())
}

/** The calls that a fork needs, with what the kernel answers to the probe where nothing is in the way. */
const NEEDED_CALLS: SystemCallProbe[] = [
  'clone3',
  'ptrace',
  'kcmp',
  'process_vm_readv',
  'pidfd_open',
  'pidfd_getfd',
  'unshare',
]

export function checkSeccomp(): CheckResult {
  const mode = Number(statusField('Seccomp') || 0)
  const blocked = NEEDED_CALLS.filter((name) => !probeSystemCall(name))
  const found = mode === 0 ? 'no filter on this process' : `a filter is on this process (mode ${mode})`
  if (blocked.length > 0) {
    return {
      name: 'seccomp',
      status: 'fail',
      found: `${found}; blocked: ${blocked.join(', ')}`,
      cost: 'no fork: criu needs these system calls',
      remedy: 'In a container, allow them: `--security-opt seccomp=unconfined`, or a profile that has them.',
    }
  }
  const ring = probeSystemCall('io_uring_setup') ? 'allowed' : 'blocked'
  return { name: 'seccomp', status: 'ok', found: `${found}; io_uring ${ring} (templates do without it)` }
}

/** 0 all processes of the user, 1 descendants only, 2 with CAP_SYS_PTRACE, 3 nobody. */
export function checkYama(): CheckResult | undefined {
  const scope = read('/proc/sys/kernel/yama/ptrace_scope')
  if (scope === '') return undefined
  const base = { name: 'ptrace', found: `kernel.yama.ptrace_scope is ${scope}` }
  if (scope === '3') {
    return {
      ...base,
      status: 'fail',
      cost: 'no fork: nobody may trace a process',
      remedy: 'It can only be lowered by a reboot: set it to 1 or 2 in /etc/sysctl.d.',
    }
  }
  return { ...base, status: 'ok' }
}

export function checkConfinement(): CheckResult | undefined {
  const name = 'confinement'
  const profile = read('/proc/self/attr/apparmor/current') || read('/proc/self/attr/current')
  const [namespaceFirst, hostFirst, count] = read('/proc/self/uid_map').split(/\s+/).map(Number)
  const mapped = namespaceFirst !== 0 || hostFirst !== 0 || count !== 4294967295
  const lines: string[] = []
  // criu finds no root of the mounts there: "No parent found for mountpoint". Tried.
  if (!/^\d+ \d+ \S+ \S+ \/ /m.test(read('/proc/self/mountinfo'))) {
    return {
      name,
      status: 'warn',
      found: 'in a chroot whose root is not a mount point',
      cost: 'criu cannot dump there',
      remedy: 'Bind the directory to itself before the chroot: mount --bind DIR DIR.',
    }
  }
  if (mapped) lines.push('in a user namespace')
  if (/\(enforce\)/.test(profile)) lines.push(`AppArmor profile ${profile}`)
  if (lines.length === 0) return undefined
  return {
    name,
    status: 'warn',
    found: lines.join(', '),
    cost: 'criu may be refused mounts, tracing or ids; the trial below says whether it is',
    remedy: 'Where the trial fails: `--security-opt apparmor=unconfined`, no user namespace.',
  }
}

export function judgePidMax(max: number): CheckResult {
  const base = { name: 'pid_max', found: String(max) }
  const remedy = 'sysctl -w kernel.pid_max=4194304'
  if (max < 32768) return { ...base, status: 'warn', cost: 'ids run out with a few thousand threads', remedy }
  if (max < 4194304)
    return {
      ...base,
      status: 'ok',
      cost: `ids come round after ${max}; a pid is soon given to another process`,
      remedy,
    }
  return { ...base, status: 'ok' }
}

export function checkPidMax(): CheckResult {
  return judgePidMax(pidMax())
}

/** Descriptors that the supervisor holds for a child: three pipes, a pidfd, and some while it is made. */
const FDS_PER_CHILD = 5

export function judgeOpenFiles(limits: string): CheckResult {
  const [, soft, hard] = /^Max open files\s+(\S+)\s+(\S+)/m.exec(limits) ?? []
  // Node raises its soft limit to the hard one when it starts.
  const usable = hard === 'unlimited' ? Number.POSITIVE_INFINITY : Number(hard)
  const base = {
    name: 'open files',
    found: soft === hard ? `at most ${hard}` : `at most ${hard} (${soft} before it is raised)`,
  }
  const children = Math.floor((usable - 100) / FDS_PER_CHILD)
  if (usable >= 4096) return { ...base, status: 'ok' }
  return {
    ...base,
    status: 'warn',
    cost: `no more than about ${Math.max(0, children)} children at once`,
    remedy: 'Raise `ulimit -n` (systemd: LimitNOFILE=65536).',
  }
}

export function checkOpenFiles(): CheckResult {
  return judgeOpenFiles(read('/proc/self/limits'))
}
