import { execFileSync } from 'node:child_process'
import {
  appendFileSync,
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Generation } from '../src/generations/generation.js'
import type { FileToKeep } from '../src/generations/kept-files.js'
import type { Store } from '../src/generations/store.js'
import { create, failure, fill, isRoot, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop
let store: Store
let library: string

beforeEach(async () => {
  shop = new Workshop()
  store = await shop.open()
  library = join(shop.directory, 'libx.so.1')
  writeFileSync(library, 'old code')
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

function keeping(files: readonly FileToKeep[], into: Store = store): Promise<Generation> {
  return create(into, async (draft) => {
    await draft.keepFiles(files)
    return fill(draft)
  })
}

/** As a package manager does it: a new file is renamed over the old one. */
function upgrade(path: string, content: string): void {
  writeFileSync(`${path}.new`, content)
  renameSync(`${path}.new`, path)
}

describe('a mapped file', () => {
  test('is taken from its own path while it is unchanged', async () => {
    const made = await keeping([{ path: library }])
    expect(made.currentPath(library)).toBe(library)
    expect(made.replacedFiles()).toEqual(new Map())
    made.checkFit(surroundings())
  })

  test('is taken from the generation once another one was renamed over it', async () => {
    const made = await keeping([{ path: library }])
    upgrade(library, 'new code')
    const kept = made.currentPath(library)!
    expect(kept.startsWith(made.directory)).toBe(true)
    expect(readFileSync(kept, 'utf8')).toBe('old code')
    expect(made.replacedFiles()).toEqual(new Map([[library, kept]]))
    made.checkFit(surroundings())
    made.checkUntouched()
    await made.verify()
  })

  test('is taken from the generation once it was removed, also by a later supervisor', async () => {
    await keeping([{ path: library }])
    rmSync(library)
    await store.close()
    const found = await (await shop.open()).get(1)
    found.checkFit(surroundings())
    expect(readFileSync(found.currentPath(library)!, 'utf8')).toBe('old code')
  })

  test('that was changed in place makes the generation misfit, unless it was kept as a reflink', async () => {
    const made = await keeping([{ path: library }])
    appendFileSync(library, '!')
    if (made.manifest.mappedFiles[0]?.kept === 'reflink') {
      expect(readFileSync(made.currentPath(library)!, 'utf8')).toBe('old code')
      return
    }
    expect(made.currentPath(library)).toBeUndefined()
    expect((await failure('GENERATION_MISFIT', () => made.checkFit(surroundings()))).happened).toContain(library)
    await failure('GENERATION_MISFIT', () => made.replacedFiles())
  })

  test('whose kept one was changed too makes the generation misfit', async () => {
    const made = await keeping([{ path: library }])
    upgrade(library, 'new code')
    const kept = made.currentPath(library)!
    truncateSync(kept, 3)
    expect(made.currentPath(library)).toBeUndefined()
  })

  test('keeps its own mode and owner where it is linked', async () => {
    chmodSync(library, 0o755)
    const before = statSync(library)
    const made = await keeping([{ path: library }])
    const after = statSync(library)
    expect([after.mode, after.uid, after.gid]).toEqual([before.mode, before.uid, before.gid])
    expect(made.manifest.mappedFiles[0]).toMatchObject({ path: library, sizeBytes: 8, use: 'mapped' })
  })

  test('that is gone or no regular file is recorded with the reason', async () => {
    const made = await keeping([{ path: join(shop.directory, 'nothing') }, { path: '/dev/zero' }])
    expect(made.manifest.mappedFiles.map(({ path, kept, reason }) => [path, kept, reason])).toEqual([
      ['/dev/zero', null, 'it is not a regular file'],
      [join(shop.directory, 'nothing'), null, 'it cannot be looked at: ENOENT'],
    ])
    expect(made.currentPath('/dev/zero')).toBe('/dev/zero')
  })

  test('that is named twice is kept once', async () => {
    const made = await keeping([{ path: library, use: 'open' }, { path: library }])
    expect(made.manifest.mappedFiles).toHaveLength(1)
    expect(made.manifest.mappedFiles[0]?.use).toBe('mapped')
  })

  test('survives the removal of the generation that kept it', async () => {
    await keeping([{ path: library }])
    await store.prune({ keep: 0 })
    expect(readFileSync(library, 'utf8')).toBe('old code')
  })
})

describe('a file that is only open for reading', () => {
  test('may grow', async () => {
    const made = await keeping([{ path: library, use: 'open' }])
    appendFileSync(library, 'more')
    expect(made.currentPath(library)).toBe(library)
    made.checkFit(surroundings())
  })

  test('is taken from the generation once it was rotated away', async () => {
    const made = await keeping([{ path: library, use: 'open' }])
    renameSync(library, `${library}.1`)
    writeFileSync(library, '')
    expect(readFileSync(made.currentPath(library)!, 'utf8')).toBe('old code')
  })
})

/** /dev/shm is another file system than the temporary directory's wherever this holds. */
const elsewhere = existsSync('/dev/shm') && statSync('/dev/shm').dev !== statSync('/tmp').dev

describe.skipIf(!elsewhere)('a file on another file system', () => {
  let far: string
  beforeEach(() => {
    far = mkdtempSync('/dev/shm/warmfork-generations-')
    library = join(far, 'liby.so')
    writeFileSync(library, 'far code', { mode: 0o755 })
    chmodSync(library, 0o4755)
  })
  afterEach(() => rmSync(far, { recursive: true, force: true }))

  test('is copied, with its owner and without its rights to write or to become another user', async () => {
    const made = await keeping([{ path: library }])
    const [entry] = made.manifest.mappedFiles
    expect(entry?.kept).toBe('copy')
    expect(statSync(join(made.directory, entry!.keptAs!)).mode & 0o7777).toBe(0o555)
    writeFileSync(library, 'changed in place')
    expect(readFileSync(made.currentPath(library)!, 'utf8')).toBe('far code')
    await made.verify()
  })

  test('whose copy was changed is found by verify', async () => {
    const made = await keeping([{ path: library }])
    const kept = join(made.directory, made.manifest.mappedFiles[0]!.keptAs!)
    chmodSync(kept, 0o755)
    writeFileSync(kept, 'bad  code')
    await failure('GENERATION_CORRUPT', () => made.verify())
  })

  test('is copied once for several generations, which share the copy', async () => {
    const first = await keeping([{ path: library }])
    const second = await keeping([{ path: library }])
    const [a, b] = [first, second].map((made) => statSync(join(made.directory, made.manifest.mappedFiles[0]!.keptAs!)))
    expect(a!.ino).toBe(b!.ino)
    first.checkUntouched()
    await store.prune({ numbers: [1] })
    upgrade(library, 'new code')
    second.checkUntouched()
    await second.verify()
    expect(readFileSync(second.currentPath(library)!, 'utf8')).toBe('far code')
  })

  test('is copied anew when it has changed since the last generation', async () => {
    await keeping([{ path: library }])
    upgrade(library, 'new code')
    const second = await keeping([{ path: library }])
    upgrade(library, 'newest code')
    expect(readFileSync(second.currentPath(library)!, 'utf8')).toBe('new code')
  })

  test('is not copied beyond the limit, and the smaller ones come first', async () => {
    const limited = await shop.open({ name: 'limited', keepCopyMaxBytes: 20 })
    const large = join(far, 'a-large.so')
    writeFileSync(large, 'x'.repeat(15))
    const made = await keeping([{ path: large }, { path: library }], limited)
    expect(made.manifest.mappedFiles.map(({ path, kept }) => [path, kept])).toEqual([
      [large, null],
      [library, 'copy'],
    ])
    expect(made.manifest.mappedFiles[0]?.reason).toContain('limit')
    made.checkFit(surroundings())
    upgrade(large, 'y')
    expect((await failure('GENERATION_MISFIT', () => made.checkFit(surroundings()))).happened).toContain('limit')
  })
})

describe.skipIf(!isRoot || !existsSync('/usr/sbin/mkfs.xfs'))('on a file system with reflinks', () => {
  test('a mapped file is a reflink, which a change of the original in place does not reach', async () => {
    const image = join(shop.directory, 'xfs')
    const mount = join(shop.directory, 'mount')
    mkdirSync(mount)
    writeFileSync(image, '')
    truncateSync(image, 320 << 20)
    execFileSync('mkfs.xfs', ['-q', image], { timeout: 60_000 })
    shop.mount(mount, '-o', 'loop', image)
    const xfs = await shop.open({ root: join(mount, 'store') })
    library = join(mount, 'libz.so')
    writeFileSync(library, 'old code')
    const made = await keeping([{ path: library }], xfs)
    expect(made.manifest.mappedFiles[0]?.kept).toBe('reflink')
    writeFileSync(library, 'new code, in place')
    expect(readFileSync(made.currentPath(library)!, 'utf8')).toBe('old code')
    made.checkFit(surroundings())
    await made.verify()
  }, 60_000)
})
