/**
 * The messages between supervisor and agents, as docs/agent-protocol.md has them: types, and how one becomes a line. It knows no
 * socket and no process.
 */
import { z } from 'zod'

export const PROTOCOL_VERSION = 1
/** Of the environment variable with the path of the socket that agents connect to. */
export const SOCKET_VARIABLE = 'WARMFORK_SOCKET'
/** Longest line from an agent, in bytes. */
export const MAX_LINE_FROM_AGENT = 8 << 20
/** Longest line to an agent, in bytes. */
export const MAX_LINE_TO_AGENT = 16 << 20
/** What a fork ends with whose hooks failed: EX_SOFTWARE of sysexits.h. */
export const FAILED_STATUS = 70

/** A string, or bytes that need not be UTF-8. */
export type Text = string | { base64: string }
export type Payload = { json: unknown } | { base64: string }

/** What is kept of an agent with the image that it is in. */
export interface AgentRecord {
  readonly agent: string
  readonly runtime: string
  readonly version: string
  readonly fd: number
  /** Whether the payload of a fork is its. */
  readonly worker: boolean
  /** Whether it waits for its line; else the program runs on as if it had none. */
  readonly parked: boolean
  /** Id of the checkpoint that it waits for. */
  readonly checkpoint: number
  /** Whether it counts the requests of its process, and parks for a refork only when none is in hand. @default false */
  readonly counts?: boolean
  /** Why the process may never be checkpointed for forks of others, where it said so. */
  readonly unsafe?: string
}

export interface AgentFailure {
  readonly hook?: string | undefined
  readonly message: string
  readonly stack?: string | undefined
  readonly code?: string | undefined
}

const id = z.int().min(0)
const pid = z.int().min(1)
const payload = z.union([z.strictObject({ json: z.unknown() }), z.strictObject({ base64: z.base64() })])
const failure = z.object({
  hook: z.string().optional(),
  message: z.string(),
  stack: z.string().optional(),
  code: z.string().optional(),
})

/** What an agent says. */
export const fromAgent = z.discriminatedUnion('type', [
  z.object({
    type: z.literal('hello'),
    protocol: z.int(),
    agent: z.string().max(100),
    runtime: z.string().max(100),
    version: z.string().max(100),
    pid,
    fd: z.int().min(0),
    counts: z.boolean().optional(),
  }),
  z.object({ type: z.literal('ready') }),
  z.object({
    type: z.literal('parked'),
    id,
    threads: z.array(z.string()).optional(),
    held: z.int().min(0).optional(),
  }),
  z.object({ type: z.literal('refused'), id, error: failure }),
  z.object({ type: z.literal('running'), error: failure.optional() }),
  z.object({ type: z.literal('failed'), error: failure }),
  z.object({ type: z.literal('fork'), id, generation: z.int().min(1).optional(), data: payload.optional() }),
  z.object({ type: z.literal('keep'), id }),
  z.object({ type: z.literal('drop'), generation: z.int().min(1) }),
  z.object({ type: z.literal('requests'), total: z.int().min(0), ms: z.number().min(0) }),
  z.object({ type: z.literal('unsafe'), reason: z.string().max(1000).optional() }),
  z.object({ type: z.literal('message'), data: payload, to: z.union([pid, z.literal('parent')]).optional() }),
])
export type FromAgent = z.infer<typeof fromAgent>
export type Hello = Extract<FromAgent, { type: 'hello' }>

export interface Forked {
  type: 'forked'
  id: number
  pid: number
  ppid: number
  generation: number
  threads: Record<string, number>
  seed: string
  timeoutMs: number
  worker: boolean
  args?: Text[]
  env?: { set: Record<string, Text>; unset: string[] }
  cwd?: Text
  data?: Payload
  call?: number
}

/** What the supervisor says. */
export type ToAgent =
  | { type: 'welcome'; protocol: number }
  | { type: 'goodbye'; reason: string }
  | { type: 'checkpoint'; id: number; reason: 'template' | 'fork' | 'refork'; timeoutMs: number }
  | { type: 'resumed'; id: number; error?: AgentFailure }
  | Forked
  | { type: 'forkResult'; id: number; pid?: number; generation?: number; error?: AgentFailure }
  | { type: 'keepResult'; id: number; generation?: number; error?: AgentFailure }
  | { type: 'childExit'; pid: number; code: number | null; signal: string | null }
  | { type: 'message'; data: Payload; from?: number | 'parent' }
  | { type: 'error'; message: string }

export function encodeLine(message: ToAgent): Buffer {
  return Buffer.from(`${JSON.stringify(message)}\n`)
}

/**
 * The message of a line; undefined for a type that is not known. Throws a SyntaxError where it is no message, or one whose
 * members are not as they should be.
 */
export function parseLine(line: Buffer): FromAgent | undefined {
  const value: unknown = JSON.parse(line.toString('utf8'))
  const type = (value as { type?: unknown } | null)?.type
  if (typeof value !== 'object' || typeof type !== 'string') throw new SyntaxError('no object with a `type`')
  if (!TYPES.has(type)) return undefined
  const parsed = fromAgent.safeParse(value)
  if (parsed.success) return parsed.data
  const issue = parsed.error.issues[0]!
  throw new SyntaxError(`\`${type}\` with a wrong \`${issue.path.join('.')}\`: ${issue.message}`)
}

const TYPES = new Set<string>(fromAgent.options.map((option) => option.shape.type.value))

/** A string as it is, other bytes as base64. */
export function textOf(value: string | Uint8Array): Text {
  if (typeof value === 'string') return value
  const bytes = Buffer.from(value.buffer, value.byteOffset, value.byteLength)
  const text = bytes.toString('utf8')
  return Buffer.from(text).equals(bytes) ? text : { base64: bytes.toString('base64') }
}

/** Bytes as bytes, anything else as JSON has it. Throws a TypeError for what JSON cannot have (a BigInt, a circle, undefined, a function). */
export function payloadOf(data: unknown): Payload {
  if (data instanceof Uint8Array) {
    return { base64: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64') }
  }
  if (JSON.stringify(data) === undefined) throw new TypeError(`a value of type ${typeof data} cannot be sent`)
  return { json: data }
}

export function payloadValue(payload: Payload): unknown {
  return 'json' in payload ? payload.json : Buffer.from(payload.base64, 'base64')
}
