/** Capabilities of this process, by name. */
import { readFileSync } from 'node:fs'

/** Bits of the capability sets, from linux/capability.h: those that matter to checkpoints. */
export const CAPABILITIES = {
  setpcap: 8,
  net_admin: 12,
  sys_ptrace: 19,
  sys_admin: 21,
  sys_resource: 24,
  checkpoint_restore: 40,
} as const
export type Capability = keyof typeof CAPABILITIES

/** `CAP_SYS_ADMIN` for `sys_admin`. */
export const capName = (name: Capability): string => `CAP_${name.toUpperCase()}`

/** What a program that this process starts would have: the effective set for root, else the ambient one. 0n where there is no /proc. */
export function inheritedCapabilities(): bigint {
  const field = process.geteuid?.() === 0 ? 'CapEff' : 'CapAmb'
  try {
    const found = new RegExp(`^${field}:\\s*([0-9a-f]+)`, 'm').exec(readFileSync('/proc/self/status', 'latin1'))
    return BigInt(`0x${found?.[1] ?? '0'}`)
  } catch {
    return 0n
  }
}

export function hasCapability(set: bigint, name: Capability): boolean {
  return ((set >> BigInt(CAPABILITIES[name])) & 1n) === 1n
}
