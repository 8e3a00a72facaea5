/**
 * What becomes of each thing that a program has open when it is forked: the table's defaults, what the user has asked for instead,
 * and whether there can be a checkpoint at all. It knows a survey, and no process and no image.
 */
import { WarmforkError } from '../errors.js'
import { type DescriptorKind, type DescriptorPolicy, descriptorKind, isDescriptorKind } from './kinds.js'
import type { OpenDescriptor } from './survey.js'

/** Policies by kind (`'unix-connection'`) or by path (`'/var/log/**'`, which goes before the kind). */
export type DescriptorPolicies = Readonly<Record<string, DescriptorPolicy>>

export interface PlannedDescriptor extends OpenDescriptor {
  readonly policy: DescriptorPolicy
}

export interface DescriptorPlan {
  readonly descriptors: readonly PlannedDescriptor[]
  /** Those that a fork is to have closed, where that is not so by itself. */
  readonly closed: readonly { readonly pid: number; readonly fd: number }[]
  /** Inodes of sockets for datagrams that a fork is not to connect anew. */
  readonly disconnected: ReadonlySet<number>
  readonly warnings: readonly string[]
}

/** Closed by what they are: nobody can be connected twice, and no lock is restored. */
const CLOSED_ANYWAY: ReadonlySet<DescriptorKind> = new Set([
  'tcp-connection',
  'unix-connection',
  'pipe-outside',
  'lock',
])

/** How many are named in a sentence. */
const NAMED = 3

/**
 * @param tried the phrase for errors, "checkpoint node server.js"
 * @throws CHECKPOINT_FAILED that names what cannot be, BAD_OPTION where a path has a policy that does not go with what is there
 */
export function planDescriptors(
  found: readonly OpenDescriptor[],
  policies: DescriptorPolicies,
  tried: string,
): DescriptorPlan {
  const globs = Object.entries(policies).flatMap(([key, policy]) =>
    isDescriptorKind(key) ? [] : [{ key, pattern: globPattern(key), policy }],
  )
  const named = new Set<DescriptorKind>()
  const descriptors = found.map((one): PlannedDescriptor => {
    const { kind, target } = one
    const byPath = kind === 'lock' ? undefined : globs.find(({ pattern }) => pattern.test(target))
    if (byPath) checkPolicy(byPath.key, byPath.policy, one)
    if (byPath || policies[kind] !== undefined) named.add(kind)
    return { ...one, policy: byPath?.policy ?? policies[kind] ?? descriptorKind(kind).policies[0] }
  })
  const refused = descriptors.filter(({ policy }) => policy === 'error')
  if (refused.length > 0) throw refusal(refused, tried)
  const closed = descriptors.filter(({ policy, kind }) => policy === 'close' && !CLOSED_ANYWAY.has(kind))
  return {
    descriptors,
    closed: closed.filter(({ kind }) => kind !== 'unix-datagram').map(({ pid, fd }) => ({ pid, fd })),
    disconnected: new Set(closed.flatMap(({ kind, inode }) => (kind === 'unix-datagram' && inode ? [inode] : []))),
    warnings: warningsOf(descriptors, named),
  }
}

/** The words of ``Expected `descriptors.x` …`` where a policy does not go with a kind; undefined where it does. */
export function whyNoPolicy(key: string, policy: DescriptorPolicy): string | undefined {
  if (!isDescriptorKind(key)) {
    return key.includes('/') ? undefined : 'not to be there: it is neither a kind of descriptor nor a path'
  }
  const { policies } = descriptorKind(key)
  return policies.includes(policy) ? undefined : `to be ${policies.map((each) => `'${each}'`).join(' or ')}`
}

/** `*` and `?` stay within a part of the path, `**` goes over all of them. */
export function globPattern(glob: string): RegExp {
  const source = glob.replace(/\*\*\/?|\*|\?|[^*?]+/g, (part) => {
    if (part.startsWith('**')) return part.endsWith('/') ? '(?:.*/)?' : '.*'
    if (part === '*') return '[^/]*'
    if (part === '?') return '[^/]'
    return part.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&')
  })
  return new RegExp(`^${source}( \\(deleted\\))?$`, 's')
}

function checkPolicy(key: string, policy: DescriptorPolicy, { kind, target }: OpenDescriptor): void {
  const { words, policies } = descriptorKind(kind)
  if (policies.includes(policy)) return
  throw new WarmforkError('BAD_OPTION', {
    tried: 'use the options',
    happened: `Expected \`descriptors['${key}']\` to be ${policies.map((each) => `'${each}'`).join(' or ')}, since ${target} is ${words}, got \`${policy}\``,
  })
}

function refusal(refused: readonly PlannedDescriptor[], tried: string): WarmforkError {
  const { kind } = refused[0]!
  const { remedy, policies } = descriptorKind(kind)
  const said = refused.slice(0, NAMED).map(({ pid, fd, kind, target }) => {
    const where = fd < 0 ? `process ${pid} has mapped` : `descriptor ${fd} of process ${pid} is`
    return `${where} ${descriptorKind(kind).words} (${target})`
  })
  const more = refused.length > NAMED ? `; and ${refused.length - NAMED} more` : ''
  const other = policies.find((policy) => policy !== 'error')
  const otherwise =
    policies[0] === 'error'
      ? `(\`descriptors: { '${kind}': '${other}' }\` lets CRIU try.)`
      : `It was asked for by \`descriptors\`; '${other}' lets the fork go on.`
  return new WarmforkError('CHECKPOINT_FAILED', {
    tried,
    happened: `${said.join('; ')}${more}`,
    remedy: `${remedy ?? 'Close it before the checkpoint.'} ${otherwise}`,
  })
}

function warningsOf(descriptors: readonly PlannedDescriptor[], named: ReadonlySet<DescriptorKind>): string[] {
  const kinds = new Set(descriptors.map(({ kind }) => kind).filter((kind) => !named.has(kind)))
  return [...kinds].flatMap((kind) => {
    const { risk, words } = descriptorKind(kind)
    if (risk === undefined) return []
    const targets = [...new Set(descriptors.filter((one) => one.kind === kind).map(({ target }) => target))]
    const more = targets.length > NAMED ? ` and ${targets.length - NAMED} more` : ''
    return [`The program has ${words} (${targets.slice(0, NAMED).join(', ')}${more}): ${risk}.`]
  })
}
