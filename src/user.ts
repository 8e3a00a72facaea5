/** Who a template runs as: names to numbers, through the system's own tools, so that directories other than /etc/passwd count. */
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { badOption } from './options.js'

const run = promisify(execFile)
const LOOKUP_TIMEOUT_MS = 10_000

export interface Identity {
  readonly uid: number
  readonly gid: number
  /** Supplementary groups, without `gid`. */
  readonly groups: readonly number[]
  /** Undefined for a number that no user has. */
  readonly name: string | undefined
  readonly home: string | undefined
}

/** A line of a system database, by name or number; undefined where there is none. */
async function lookUp(database: 'passwd' | 'group', key: string | number): Promise<string[] | undefined> {
  try {
    const { stdout } = await run('getent', [database, String(key)], { timeout: LOOKUP_TIMEOUT_MS })
    return stdout.trim().split(':')
  } catch {
    return undefined
  }
}

/**
 * @returns undefined where neither is given: the supervisor's own user
 * @throws BAD_OPTION where there is no such user or group, or the supervisor is not root
 */
export async function resolveIdentity(
  user: string | number | undefined,
  group: string | number | undefined,
): Promise<Identity | undefined> {
  if (user === undefined && group === undefined) return undefined
  const passwd = user === undefined ? undefined : await lookUp('passwd', user)
  const isNumber = (value: string | number) => /^\d+$/.test(String(value))
  if (user !== undefined && !passwd && !isNumber(user)) throw badOption('user', 'to be a user of this machine', user)
  const groupLine = group === undefined ? undefined : await lookUp('group', group)
  if (group !== undefined && !groupLine && !isNumber(group))
    throw badOption('group', 'to be a group of this machine', group)
  const uid = user === undefined ? process.getuid!() : Number(passwd?.[2] ?? user)
  const gid = group === undefined ? Number(passwd?.[3] ?? Number.NaN) : Number(groupLine?.[2] ?? group)
  if (Number.isNaN(gid)) throw badOption('group', 'to be given, since the user has no entry that names one', group)
  if (process.getuid!() !== 0 && (uid !== process.getuid!() || gid !== process.getgid!())) {
    throw badOption(
      user === undefined ? 'group' : 'user',
      'to be left out, since only root can start a program as somebody else',
      user ?? group,
    )
  }
  return { uid, gid, groups: await supplementaryGroups(passwd?.[0], gid), name: passwd?.[0], home: passwd?.[5] }
}

async function supplementaryGroups(name: string | undefined, gid: number): Promise<number[]> {
  if (name === undefined) return []
  try {
    const { stdout } = await run('id', ['-G', name], { timeout: LOOKUP_TIMEOUT_MS })
    return stdout
      .trim()
      .split(/\s+/)
      .map(Number)
      .filter((id) => id !== gid)
  } catch {
    return []
  }
}
