/** The rights that criu needs, and whether a criu that we start has them. */
import { execFileSync } from 'node:child_process'
import { WarmforkError } from '../../errors.js'
import { type Capability, capName, hasCapability, inheritedCapabilities } from '../../linux/capabilities.js'

/** To choose ids, to stop and to read processes, to set what they are; tried with exactly these four. */
export const CRIU_CAPABILITIES = [
  'checkpoint_restore',
  'sys_ptrace',
  'sys_admin',
  'setpcap',
] as const satisfies Capability[]

export function missingCapabilities(set: bigint = inheritedCapabilities()): Capability[] {
  return CRIU_CAPABILITIES.filter((name) => !hasCapability(set, name))
}

/** How somebody gets them. */
export function capabilityRemedy(uid: number, missing: readonly Capability[]): string {
  return uid === 0
    ? `Add them to the container (docker run ${missing.map((name) => `--cap-add ${capName(name)}`).join(' ')}).`
    : `Run as root, or give them as ambient capabilities (systemd: AmbientCapabilities=${CRIU_CAPABILITIES.map(capName).join(' ')}).`
}

/** Throws CRIU_RIGHTS. A criu that is installed with capabilities of its own (setcap) needs none from us. */
export function requireRights(hasOwn: boolean): void {
  const missing = hasOwn ? [] : missingCapabilities()
  if (missing.length === 0) return
  const uid = process.geteuid?.() ?? -1
  throw new WarmforkError('CRIU_RIGHTS', {
    tried: 'use criu',
    happened: `${uid === 0 ? 'root' : `user ${uid}`} lacks ${missing.map(capName).join(', ')}`,
    remedy: capabilityRemedy(uid, missing),
  })
}

/** Whether criu itself carries capabilities (setcap). getcap comes with libcap; without it the answer is no. */
export function hasFileCapabilities(criu: { argv: readonly string[] }): boolean {
  try {
    const said = execFileSync('getcap', [criu.argv[0]!], {
      encoding: 'utf8',
      timeout: 5_000,
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    return CRIU_CAPABILITIES.every((name) => said.includes(`cap_${name}`))
  } catch {
    return false
  }
}
