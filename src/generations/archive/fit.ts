/**
 * Whether this machine can have forks of an archive: the same kernel, CPU and CRIU, and each file that the image maps, by size
 * and content, since inodes and times differ between machines. It changes nothing.
 */
import { type BigIntStats, lstatSync } from 'node:fs'
import { errnoOf, WarmforkError } from '../../errors.js'
import { fileChecksum } from '../checksum.js'
import type { MappedFile } from '../manifest.js'
import { currentSurroundings, differences, type Surroundings } from '../surroundings.js'
import type { ArchiveContents } from './contents.js'
import { TRIED } from './failure.js'

/** What was seen of the files whose content was compared, by path. */
type Seen = ReadonlyMap<string, BigIntStats>

/** Gives the surroundings of the new generation. Throws GENERATION_MISFIT with each difference. */
export async function checkFit(
  { generation, files }: ArchiveContents,
  criuVersion: string,
  signal?: AbortSignal,
): Promise<{ surroundings: Surroundings; seen: Seen }> {
  const { declaredEnv, ...made } = generation.surroundings
  const now = { ...currentSurroundings({ ...made, criuVersion, declaredEnv: {} }), declaredEnv }
  const reasons = differences(generation.surroundings, now)
  const seen = new Map<string, BigIntStats>()
  // Sizes first: where one differs, no content need be read.
  const [alike, odd] = [[] as ArchiveContents['files'], [] as string[]]
  for (const file of files) {
    const stats = lstatSync(file.path, { bigint: true, throwIfNoEntry: false })
    if (!stats) odd.push(`the file ${file.path} is not there`)
    else if (file.sha256 === null) {
      if (stats.isFile()) odd.push(`the file ${file.path} is a regular file here and was none`)
    } else if (!stats.isFile()) odd.push(`the file ${file.path} is not a regular file here`)
    else if (stats.size !== BigInt(file.sizeBytes)) {
      odd.push(`the file ${file.path} has ${stats.size} bytes here and had ${file.sizeBytes}`)
    } else {
      seen.set(file.path, stats)
      alike.push(file)
    }
  }
  if (reasons.length === 0 && odd.length === 0) {
    for (const { path, sha256 } of alike) {
      signal?.throwIfAborted()
      if (sha256 !== (await contentOf(path))) odd.push(`the file ${path} has another content here`)
    }
  }
  if (reasons.length > 0 || odd.length > 0) throw misfit([...reasons, ...odd])
  return { surroundings: now, seen }
}

/** That what was kept is what was compared. Throws GENERATION_MISFIT. */
export function checkKept(kept: readonly MappedFile[], seen: Seen): void {
  const changed = kept.filter(({ path, inode, sizeBytes, mtimeNs }) => {
    const before = seen.get(path)
    if (!before) return false
    return inode !== String(before.ino) || BigInt(sizeBytes) !== before.size || mtimeNs !== String(before.mtimeNs)
  })
  if (changed.length > 0) throw misfit(changed.map(({ path }) => `the file ${path} changed meanwhile`))
}

async function contentOf(path: string): Promise<string | undefined> {
  try {
    return (await fileChecksum(path)).sha256
  } catch (error) {
    if (errnoOf(error) === undefined) throw error
    return undefined
  }
}

function misfit(reasons: readonly string[]): WarmforkError {
  return new WarmforkError('GENERATION_MISFIT', {
    tried: TRIED,
    happened: `this machine differs from the one it was exported on: ${reasons.join('; ')}`,
    remedy: 'Import it on a machine that is the same in these, with the same files at the same paths.',
  })
}
