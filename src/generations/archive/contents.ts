/**
 * The list that an archive begins with: what the generation is, which members follow, in their order, and which files of the
 * machine it maps, each with its size and SHA-256. The digest of an archive is that of this list, and so covers all of it,
 * however it is compressed. It knows no streams and no store.
 */
import { createHash } from 'node:crypto'
import { z } from 'zod'
import { WarmforkError } from '../../errors.js'
import type { Run } from '../checksum.js'
import { canonical, manifestMembers } from '../manifest.js'
import { invalid, TRIED } from './failure.js'

export const CONTENTS_NAME = 'warmfork-archive.json'
export const SIGNATURE_NAME = 'warmfork-archive.sig'
const FORMAT = 'warmfork-archive'
export const ARCHIVE_VERSION = 1
/** Three times that of a large program of 20,000 files that are watched. */
export const MAX_CONTENTS_BYTES = 16 << 20

const sha256 = z.string().regex(/^[0-9a-f]{64}$/)
const count = z.number().int().nonnegative()

const IMAGE_NAME = /^image\/[A-Za-z0-9][A-Za-z0-9._-]{0,79}\.img$/
const PAGE_FILE_NAME = /^memory-[A-Za-z0-9-]{1,40}\.warmfork-pages$/
const RUNS_SUFFIX = '.runs'

const member = z.strictObject({
  name: z.string(),
  /** As it lies in the archive: of a page file, its data without the holes. */
  bytes: count,
  sha256,
  /** Of a page file: its size with the holes. */
  apparentBytes: count.optional(),
})

const schema = z.strictObject({
  format: z.literal(FORMAT),
  formatVersion: z.literal(ARCHIVE_VERSION),
  generation: z.strictObject({
    name: z.string(),
    number: z.number().int().positive(),
    createdAt: z.iso.datetime(),
    warmforkVersion: z.string(),
    /** Under which the image names its page files. */
    directory: z.string(),
    reforks: manifestMembers.reforks,
    surroundings: manifestMembers.surroundings,
    memory: manifestMembers.memory,
    warnings: manifestMembers.warnings,
    rssBytes: manifestMembers.rssBytes,
    processes: manifestMembers.processes,
    edits: manifestMembers.edits,
    engineData: manifestMembers.engineData,
    checkpointMs: z.number(),
    prepareMs: z.number(),
  }),
  members: z.array(member).min(1).max(100_000),
  files: z.array(
    z.strictObject({
      path: z.string().startsWith('/'),
      use: z.enum(['mapped', 'open']),
      sizeBytes: count,
      /** Null for what is no regular file: a device, a directory. */
      sha256: sha256.nullable(),
    }),
  ),
})

export type ArchiveContents = z.infer<typeof schema>
export type ArchiveMember = z.infer<typeof member>

/** Its text, and the digest of that. */
export function encodeContents(contents: Omit<ArchiveContents, 'format' | 'formatVersion'>): {
  text: Buffer
  digest: string
} {
  const text = Buffer.from(canonical({ format: FORMAT, formatVersion: ARCHIVE_VERSION, ...contents }))
  return { text, digest: digestOf(text) }
}

export function digestOf(text: Uint8Array): string {
  return `sha256:${createHash('sha256').update(text).digest('hex')}`
}

/** Throws ARCHIVE_INVALID; GENERATION_MISFIT for a newer format. */
export function decodeContents(text: Buffer): ArchiveContents {
  let parsed: unknown
  try {
    parsed = JSON.parse(text.toString('utf8'))
    // As it was written, to the byte: a key that stands in it twice would be read otherwise by other programs.
    if (!Buffer.from(canonical(parsed)).equals(text)) throw new Error('it is not written in the canonical form')
  } catch (cause) {
    throw invalid('its list is damaged', { cause })
  }
  const { format, formatVersion } = (parsed ?? {}) as { format?: unknown; formatVersion?: unknown }
  if (format !== FORMAT) throw invalid('its list is not one of `warmfork export`')
  if (typeof formatVersion === 'number' && formatVersion > ARCHIVE_VERSION) {
    throw new WarmforkError('GENERATION_MISFIT', {
      tried: TRIED,
      happened: `its format is version ${formatVersion} and this warmfork knows version ${ARCHIVE_VERSION}`,
      remedy: 'Use the warmfork that made it, or a newer one.',
    })
  }
  try {
    const contents = schema.parse(parsed)
    checkMembers(contents.members)
    return contents
  } catch (cause) {
    if (cause instanceof WarmforkError) throw cause
    // Also a RangeError, for what is nested too deep.
    const why = cause instanceof z.ZodError ? z.prettifyError(cause) : String(cause)
    throw invalid(`its list does not say what it should: ${why}`, { cause })
  }
}

export function isPageFile(name: string): boolean {
  return PAGE_FILE_NAME.test(name)
}

export function runsName(pageFile: string): string {
  return `${pageFile}${RUNS_SUFFIX}`
}

/** Names that lead nowhere else, none twice, and the runs of each page file right before it. */
function checkMembers(members: readonly ArchiveMember[]): void {
  const seen = new Set<string>()
  let totalBytes = 0
  members.forEach(({ name, bytes, apparentBytes }, index) => {
    const shown = JSON.stringify(name)
    const isPages = isPageFile(name)
    const isRuns = name.endsWith(RUNS_SUFFIX) && isPageFile(name.slice(0, -RUNS_SUFFIX.length))
    if (!isPages && !isRuns && !IMAGE_NAME.test(name))
      throw invalid(`its list names a member ${shown}, which no generation has`)
    if (seen.has(name)) throw invalid(`its list names the member ${shown} twice`)
    seen.add(name)
    const [before, after] = [members[index - 1]?.name, members[index + 1]?.name]
    if (
      isPages !== (apparentBytes !== undefined) ||
      (isPages && before !== runsName(name)) ||
      (isRuns && runsName(after ?? '') !== name)
    ) {
      throw invalid(`its list does not say of ${shown} where its data lie`)
    }
    if (isRuns && bytes > MAX_RUNS_BYTES) throw invalid(`its member ${shown} has ${bytes} bytes, more than any`)
    totalBytes += bytes
  })
  if (!Number.isSafeInteger(totalBytes)) throw invalid('its list names more bytes than there are numbers for')
}

/** A million stretches; a process has at most 65,530 mappings. */
const MAX_RUNS_BYTES = 16 << 20

/** Throws ARCHIVE_INVALID where the stretches are not in order, overlap, or do not hold what the member holds. */
export function checkRuns(encoded: Buffer, { name, bytes, apparentBytes = 0 }: ArchiveMember): Run[] {
  const wrong = (happened: string) => invalid(`the stretches of its member ${name} ${happened}`)
  if (encoded.length % 16 !== 0) throw wrong('are not whole pairs of numbers')
  const runs: Run[] = []
  let end = 0
  let total = 0
  for (let at = 0; at < encoded.length; at += 16) {
    const [offset, length] = [encoded.readBigUInt64LE(at), encoded.readBigUInt64LE(at + 8)]
    if (offset + length > BigInt(apparentBytes)) throw wrong(`reach beyond its ${apparentBytes} bytes`)
    if (length === 0n) throw wrong('hold an empty one')
    if (offset < end) throw wrong('overlap or are not in order')
    runs.push([Number(offset), Number(length)])
    end = Number(offset + length)
    total += Number(length)
  }
  if (total !== bytes) throw wrong(`hold ${total} bytes and it has ${bytes}`)
  return runs
}
