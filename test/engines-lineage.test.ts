import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { encodeWiped, Lineage } from '../src/engines/criu/lineage.js'
import type { Generation } from '../src/generations/generation.js'
import { create, fill, PAGE_FILE, RUNS, Workshop } from './fixtures/generations.js'
import { regular, tinyImage } from './fixtures/tiny-image.js'

let shop: Workshop

beforeEach(() => {
  shop = new Workshop()
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

const WIPED = new Map([
  [8, [{ start: 0x7f00_0000_0000n, end: 0x7f00_0000_1000n }]],
  [7, []],
  [9, [{ start: 0x1000n, end: 0x3000n }]],
])

async function parentOf(files: readonly string[] = []): Promise<Generation> {
  return create(await shop.open(), async (draft) => {
    await draft.keepFiles(files.map((path) => ({ path })))
    return {
      ...(await fill(draft)),
      processes: [7, 8, 9].map((pid) => ({ pid, threads: 1, comm: 'app' })),
      engineData: { wiped: encodeWiped(WIPED).map(({ pid, ranges }) => ({ pid, ranges })) },
    }
  })
}

describe('the lineage of a fork', () => {
  test('has the page files of its parent, with the paths that they will have', async () => {
    const parent = await parentOf()
    const { pageFiles } = await Lineage.of(parent, '/store/2')
    expect(pageFiles).toEqual([
      {
        name: PAGE_FILE,
        seenPath: join(parent.directory, PAGE_FILE),
        path: `/store/2/${PAGE_FILE}`,
        runs: RUNS,
        sizeBytes: RUNS[1]![0] + RUNS[1]![1],
      },
    ])
  })

  test('carries ranges that are wiped on fork over to the ids that its processes have now', async () => {
    const lineage = await Lineage.of(await parentOf(), '/store/2')
    expect(lineage.wiped([100, 101, 102])).toEqual(
      new Map([
        [101, WIPED.get(8)],
        [102, WIPED.get(9)],
      ]),
    )
    // Only the root is known.
    expect(lineage.wiped([100])).toEqual(new Map())
  })

  test('names a kept file by its first path, unless the image names that path too', async () => {
    const library = join(shop.directory, 'library.so')
    writeFileSync(library, 'code')
    const parent = await parentOf([library])
    const kept = parent.keptCopies[0]!.path
    const lineage = await Lineage.of(parent, '/store/2')
    const imageOf = (...names: string[]) => {
      const directory = join(shop.directory, `image-${names.length}`)
      mkdirSync(directory)
      const files = names.map((name, index) => regular(10 + index, name))
      return tinyImage(directory, { processes: [{ pid: 50 }], files })
    }
    const alone = lineage.originals(imageOf(kept))
    expect(alone).toEqual(new Map([[kept, library]]))
    expect(lineage.filesToKeep([{ path: kept, use: 'mapped' }], alone)).toEqual([
      { path: library, use: 'mapped', keptBy: parent.keptCopies[0] },
    ])
    const both = lineage.originals(imageOf(kept, library))
    expect(both).toEqual(new Map())
    expect(lineage.filesToKeep([{ path: kept, use: 'mapped' }], both)).toEqual([{ path: kept, use: 'mapped' }])
  })

  test('keeps no page file as a file that is mapped', async () => {
    const parent = await parentOf()
    const lineage = await Lineage.of(parent, '/store/2')
    const seen = { path: join(parent.directory, PAGE_FILE), use: 'mapped' as const }
    expect(lineage.filesToKeep([seen], new Map())).toEqual([])
  })
})
