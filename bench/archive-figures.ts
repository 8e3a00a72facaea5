/**
 * What exporting a generation into a file and importing it take, by how the archive is compressed. The caller gives the
 * generation; files and imported generations go into a directory that is removed.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Compression, exportGeneration, importGeneration } from '../src/archive.js'

export interface ArchiveFigures {
  /** Of the data of the generation, without holes, before it is compressed. */
  readonly exportMiBPerSecond: number
  /** The same, until the generation is synced to the disk. */
  readonly importMiBPerSecond: number
  readonly importMsPerGiB: number
  readonly archiveMiB: number
}

export interface MeasureOptions {
  /** As of a supervisor; it may run. */
  readonly name: string
  readonly store?: string
  readonly generation: number
  /** On the file system that is to be measured. @default a temporary one */
  readonly directory?: string
  /** Of which the medians are given. @default 3 */
  readonly rounds?: number
}

/** Figures for each way to compress. */
export async function measureArchive(options: MeasureOptions): Promise<Record<Compression, ArchiveFigures>> {
  const { name, store, generation, directory = tmpdir(), rounds = 3 } = options
  const place = mkdtempSync(join(directory, 'warmfork-archives-'))
  const measure = async (compress: Compression): Promise<ArchiveFigures> => {
    const [exportMs, importMs]: [number[], number[]] = [[], []]
    let [dataBytes, archiveBytes] = [0, 0]
    for (let round = 0; round < rounds; round++) {
      const file = join(place, 'archive')
      const begun = performance.now()
      const exported = await exportGeneration({
        name,
        generation,
        file,
        compress,
        ...(store === undefined ? {} : { store }),
      })
      const between = performance.now()
      await importGeneration({ file, store: join(place, 'store'), name: 'imported', digest: exported.digest })
      importMs.push(performance.now() - between)
      exportMs.push(between - begun)
      ;({ dataBytes, archiveBytes } = exported)
      rmSync(file)
      rmSync(join(place, 'store'), { recursive: true })
    }
    const mib = dataBytes / 2 ** 20
    return {
      exportMiBPerSecond: Math.round((mib / median(exportMs)) * 1000),
      importMiBPerSecond: Math.round((mib / median(importMs)) * 1000),
      importMsPerGiB: Math.round((median(importMs) / mib) * 1024),
      archiveMiB: Math.round(archiveBytes / 2 ** 20),
    }
  }
  try {
    return { none: await measure('none'), gzip: await measure('gzip'), zstd: await measure('zstd') }
  } finally {
    rmSync(place, { recursive: true, force: true })
  }
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)]!
}
