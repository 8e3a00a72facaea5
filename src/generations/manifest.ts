/**
 * The manifest of a generation: its schema, and how it is written and read so that no byte of it can change unseen.
 * It knows no directory but the one it is given, and nothing of what the engine's own data in it mean.
 *
 * The file is canonical JSON (keys sorted, two spaces of indentation, a newline at the end) with a checksum of itself. A
 * reader of any version checks that first and `formatVersion` after it; so neither may ever change its meaning.
 */
import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { errnoOf, WarmforkError } from '../errors.js'

export const MANIFEST_FILE = 'manifest.json'
export const FORMAT_VERSION = 1

const sha256 = z.string().regex(/^[0-9a-f]{64}$/)
const count = z.number().int().nonnegative()
const decimal = z.string().regex(/^-?\d+$/)
/** Below the generation's directory, without a way out of it. */
const relativePath = z
  .string()
  .refine((path) => path !== '' && path.split('/').every((part) => !['', '.', '..'].includes(part)))

const storedFile = z.strictObject({
  /** Apparent size. */
  bytes: count,
  /** Absent only in a generation that is `ephemeral`. */
  sha256: sha256.optional(),
  /** For a page file: the file of its runs. `sha256` then covers those only. */
  runs: relativePath.optional(),
  /** Of a page file when it was complete: as long as both are the same, nobody has put another in its place. */
  mtimeNs: decimal.optional(),
  inode: decimal.optional(),
})

const mappedFile = z.strictObject({
  path: z.string(),
  /** Mapped into memory, or only open for reading. */
  use: z.enum(['mapped', 'open']),
  sizeBytes: count,
  /** Decimal nanoseconds: a number of JavaScript does not hold them. */
  mtimeNs: decimal,
  inode: decimal,
  device: decimal,
  kept: z.enum(['link', 'reflink', 'copy']).nullable(),
  keptAs: relativePath.optional(),
  /** Of the kept file. */
  keptMtimeNs: decimal.optional(),
  /** Why nothing was kept. */
  reason: z.string().optional(),
})

const schema = z.strictObject({
  formatVersion: z.literal(FORMAT_VERSION),
  number: z.number().int().positive(),
  /** The generation whose child this one was taken of; null for one taken of a template. */
  parent: z.number().int().positive().nullable(),
  /** How many checkpoints of forks lie between it and the template. Absent: 0. */
  reforks: count.optional(),
  /** Why it was made, for people. */
  reason: z.string().optional(),
  name: z.string(),
  /** Set where it lives no longer than the supervisor that made it: it was not synced, and no checksums were taken. */
  ephemeral: z.literal(true).optional(),
  /** ISO 8601, UTC. */
  createdAt: z.iso.datetime(),
  warmforkVersion: z.string(),
  surroundings: z.strictObject({
    kernelRelease: z.string(),
    architecture: z.string(),
    cpuModel: z.string(),
    cpuFlagsHash: sha256,
    criuVersion: z.string(),
    command: z.array(z.string()),
    cwd: z.string(),
    uid: count,
    gid: count,
    declaredEnv: z.record(z.string(), sha256),
    options: z.record(z.string(), z.string()).optional(),
    watched: z.strictObject({ globs: z.array(z.string()).readonly(), files: z.string() }).optional(),
  }),
  memory: z.enum(['cow', 'copy']),
  warnings: z.array(z.string()),
  rssBytes: count,
  processes: z.array(z.strictObject({ pid: count, threads: count, comm: z.string() })),
  mappedFiles: z.array(mappedFile),
  /** What prepare changed, for people. */
  edits: z.json(),
  /** What the engine needs to know again at each fork. */
  engineData: z.json(),
  /** Every file of the generation but this one, its leases and the kept files that are links. */
  files: z.record(relativePath, storedFile),
  sizes: z.strictObject({ apparentBytes: count, allocatedBytes: count }),
  times: z.strictObject({ checkpointMs: z.number(), prepareMs: z.number(), syncMs: z.number() }),
})

/** The schemas of its members: an archive has some of them too. */
export const manifestMembers = schema.shape
export type Manifest = z.infer<typeof schema>
export type MappedFile = z.infer<typeof mappedFile>
export type StoredFile = z.infer<typeof storedFile>
export type Json = z.infer<ReturnType<typeof z.json>>

/** The text of the manifest's file. */
export function encodeManifest(manifest: Manifest): string {
  return canonical({ ...manifest, checksum: checksumOf(manifest) })
}

/** Reads and checks the manifest of a generation's directory. Throws GENERATION_CORRUPT, GENERATION_MISFIT (a newer format). */
export async function readManifest(directory: string, number: number): Promise<Manifest> {
  let text: string
  try {
    text = await readFile(join(directory, MANIFEST_FILE), 'utf8')
  } catch (cause) {
    const happened = errnoOf(cause) === 'ENOENT' ? 'it has no manifest' : 'its manifest cannot be read'
    throw new WarmforkError('GENERATION_CORRUPT', { tried: `read generation ${number}`, happened, cause })
  }
  return decodeManifest(text, number)
}

/** The manifest in a text. Throws as `readManifest` does. */
export function decodeManifest(text: string, number: number): Manifest {
  const corrupt = (happened: string, cause?: unknown) =>
    new WarmforkError('GENERATION_CORRUPT', { tried: `read generation ${number}`, happened, cause })
  let parsed: unknown
  try {
    parsed = JSON.parse(text)
  } catch (cause) {
    throw corrupt('its manifest is not JSON', cause)
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed))
    throw corrupt('its manifest is not an object')
  const { checksum, ...body } = parsed as Record<string, unknown>
  // The text is compared whole, since a changed space or a key written twice would not change what was parsed.
  if (checksum !== checksumOf(body) || canonical({ ...body, checksum }) !== text) {
    throw corrupt('its manifest does not match its own checksum')
  }
  if (body.formatVersion !== FORMAT_VERSION) {
    throw new WarmforkError('GENERATION_MISFIT', {
      tried: `read generation ${number}`,
      happened: `its format is version ${String(body.formatVersion)} and this warmfork knows version ${FORMAT_VERSION}`,
      remedy: 'Use the warmfork that made it, or prune it.',
    })
  }
  const checked = schema.safeParse(body)
  if (!checked.success)
    throw corrupt(`its manifest lacks what it needs: ${z.prettifyError(checked.error)}`, checked.error)
  if (checked.data.number !== number) throw corrupt(`its manifest is that of generation ${checked.data.number}`)
  return checked.data
}

function checksumOf(body: Record<string, unknown>): string {
  return createHash('sha256').update(canonical(body)).digest('hex')
}

/** JSON with the keys sorted at each level, so that the same content has the same bytes. */
export function canonical(value: unknown): string {
  return `${JSON.stringify(sorted(value), null, 2)}\n`
}

function sorted(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sorted)
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(
    Object.entries(value)
      .filter(([, member]) => member !== undefined)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([key, member]) => [key, sorted(member)]),
  )
}
