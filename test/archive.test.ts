/** Archives of generations: what travels, what comes out, which machine they fit, and who made them. No process is started but tar. */
import { execFileSync } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { chmodSync, existsSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { exportGeneration, importGeneration } from '../src/archive.js'
import { COMPRESSIONS } from '../src/generations/archive/blocks.js'
import { privateKey, publicKey } from '../src/generations/archive/signature.js'
import { contentBytes, openZstd } from '../src/generations/archive/zstd.js'
import { decodeRuns } from '../src/generations/checksum.js'
import type { Generation } from '../src/generations/generation.js'
import type { Store } from '../src/generations/store.js'
import { Verdicts } from '../src/generations/verdicts.js'
import { ImageSet } from '../src/image/image-set.js'
import {
  CRIU_VERSION,
  createWhole,
  entriesOf,
  exported,
  forged,
  imported,
  unpacked,
  writeLibrary,
} from './fixtures/archives.js'
import { create, failure, PAGE_FILE, RUNS, surroundings, Workshop } from './fixtures/generations.js'

let shop: Workshop
let store: Store
let other: Store
let library: string
let generation: Generation

beforeEach(async () => {
  shop = new Workshop()
  store = await shop.open()
  other = await shop.open({ name: 'other' })
  library = writeLibrary(shop.directory)
  generation = await createWhole(store, { files: [library] })
})

afterEach(async () => {
  await shop[Symbol.asyncDispose]()
})

/** All bytes of a page file that are no holes. */
function dataOf({ directory }: Generation): Buffer {
  const bytes = join(directory, PAGE_FILE)
  const copied = execFileSync('dd', [`if=${bytes}`, 'bs=4096', `skip=${RUNS[1]![0] / 4096}`, 'status=none'])
  return Buffer.concat([execFileSync('head', ['-c', String(RUNS[0]![1]), bytes]), copied])
}

describe.each(COMPRESSIONS)('an archive (%s)', (compress) => {
  test('gives a generation of the same content under the next number', async () => {
    await createWhole(other)
    const made = await imported(other, (await exported(generation, { compress })).bytes)
    expect(made.number).toBe(2)
    await made.verify()
    made.checkUntouched()
    made.checkFit(surroundings({ criuVersion: CRIU_VERSION }))
    expect(dataOf(made)).toEqual(dataOf(generation))
    expect(await made.runs(PAGE_FILE)).toEqual(RUNS)
    expect(statSync(join(made.directory, PAGE_FILE)).size).toBe(statSync(join(generation.directory, PAGE_FILE)).size)
    const { edits, engineData, processes, memory, warnings } = generation.manifest
    expect(made.manifest).toMatchObject({ parent: null, name: 'other', edits, engineData, processes, memory, warnings })
    expect(made.manifest.surroundings).toEqual(generation.manifest.surroundings)
  })

  test('has the digest that all archives of the generation have', async () => {
    const { digest } = await exported(generation)
    expect((await exported(generation, { compress })).digest).toBe(digest)
  })

  test('can be read by tar', async () => {
    const file = join(shop.directory, 'archive')
    writeFileSync(file, (await exported(generation, { compress })).bytes)
    const plain = { none: ['cat', file], gzip: ['zcat', '-f', file], zstd: ['zstd', '-dcq', file] }[compress]
    const tar = execFileSync('sh', ['-c', '"$@" | tar -tvf -', 'sh', ...plain], { encoding: 'utf8' })
    expect(tar.split('\n')[0]).toMatch(/^-r-------- 0\/0 +\d+ .* warmfork-archive\.json$/)
    expect(tar).toMatch(new RegExp(` 12288 .* ${PAGE_FILE}$`, 'm'))
  })
})

describe('what travels', () => {
  test('is the data of a page file, without its holes', async () => {
    const { bytes, dataBytes, archiveBytes } = await exported(generation)
    expect(archiveBytes).toBe(bytes.length)
    expect(dataBytes).toBeLessThan(32_768)
    expect(bytes.length).toBeLessThan(65_536)
  })

  test('comes to lie in a file with the same holes', async () => {
    const made = await imported(other, (await exported(generation)).bytes)
    expect(statSync(join(made.directory, PAGE_FILE)).blocks * 512).toBeLessThan(1 << 20)
    expect(made.manifest.sizes.allocatedBytes).toBeLessThan(1 << 20)
  })

  test('is not what was kept of the files of the machine', async () => {
    const names = unpacked((await exported(generation)).bytes).map(({ name }) => name)
    expect(names.filter((name) => name.startsWith('files/'))).toEqual([])
    const made = await imported(other, (await exported(generation)).bytes)
    expect(made.manifest.mappedFiles).toMatchObject([{ path: library, use: 'mapped' }])
    expect(made.keptCopies).toHaveLength(1)
  })

  test('is named in the image by its new place', async () => {
    const made = await imported(other, (await exported(generation)).bytes)
    const names = ImageSet.read(made.imageDirectory)
      .files()
      .map(({ regular }) => regular?.name)
    expect(names).toContain(join(made.directory, PAGE_FILE))
    expect(names.filter((name) => name?.startsWith(generation.directory))).toEqual([])
  })

  test('is every page file of a chain', async () => {
    const second = await createWhole(store, { parent: generation })
    expect(second.pageFiles.sort()).toEqual(['memory-1.warmfork-pages', 'memory-2.warmfork-pages'])
    const made = await imported(other, (await exported(second)).bytes)
    await made.verify()
    expect(made.pageFiles.sort()).toEqual(second.pageFiles.sort())
    expect(made.manifest).toMatchObject({ parent: null, reforks: 1 })
    expect(statSync(join(made.directory, PAGE_FILE)).nlink).toBe(1)
  })

  test('is as much of an ephemeral generation, which has no checksums', async () => {
    const made = await imported(other, (await exported(await createWhole(store, { durable: false }))).bytes)
    expect(made.ephemeral).toBe(false)
    await made.verify()
  })

  test('is refused where the generation was changed since it was made', async () => {
    const path = join(generation.imageDirectory, 'files.img')
    const bytes = readFileSync(path)
    bytes[bytes.length - 1]! ^= 1
    chmodSync(path, 0o600)
    writeFileSync(path, bytes)
    await failure('GENERATION_CORRUPT', () => exported(generation))
  })

  test('is of the files that were mapped, also where one was upgraded since', async () => {
    const { digest } = await exported(generation)
    writeFileSync(`${library}.new`, 'code of a newer library')
    renameSync(`${library}.new`, library)
    expect((await exported(generation)).digest).toBe(digest)
  })
})

describe('a machine', () => {
  const archive = async () => (await exported(generation)).bytes
  const refusal = async (bytes: Buffer) => {
    const error = await failure('GENERATION_MISFIT', () => imported(other, bytes))
    expect(entriesOf(other)).toEqual([])
    return error.happened
  }

  test.each([
    ['another kernel', { kernelRelease: '5.0.0' }, 'the kernel was 5.0.0 and is '],
    ['another CRIU', { criuVersion: '4.1.1' }, `CRIU was 4.1.1 and is ${CRIU_VERSION} now`],
    ['another CPU', { cpuFlagsHash: '0'.repeat(64), cpuModel: 'Z80' }, 'the CPU has other features'],
    ['another architecture', { architecture: 'pdp11' }, 'the architecture was pdp11'],
  ])('with %s does not fit', async (_, changes, words) => {
    const bytes = forged(await archive(), ({ generation }) => Object.assign(generation.surroundings, changes))
    expect(await refusal(bytes)).toContain(words)
  })

  test('without a file that is mapped does not fit, and each such file is named', async () => {
    const bytes = forged(await archive(), ({ files }) => {
      files.push({ path: '/no/such/file', use: 'open', sizeBytes: 3, sha256: '0'.repeat(64) })
      files.push({ path: '/no/such/device', use: 'open', sizeBytes: 0, sha256: null })
      files.push({ path: '/etc/passwd', use: 'open', sizeBytes: 0, sha256: null })
    })
    rmSync(library)
    const happened = await refusal(bytes)
    expect(happened).toContain('the file /etc/passwd is a regular file here and was none')
    for (const path of [library, '/no/such/file', '/no/such/device']) {
      expect(happened).toContain(`the file ${path} is not there`)
    }
  })

  test.each([
    ['size', 'code of another library', /library\.so has 23 bytes here and had 17/],
    ['content', 'code of a lobrary', /library\.so has another content here/],
  ])('where a file has another %s does not fit', async (_, content, words) => {
    const bytes = await archive()
    writeFileSync(library, content)
    expect(await refusal(bytes)).toMatch(words)
  })

  test('where the same file has another inode and time fits, and the generation has those', async () => {
    const bytes = await archive()
    rmSync(library)
    writeLibrary(shop.directory)
    const made = await imported(other, bytes)
    const { ino, mtimeNs } = statSync(library, { bigint: true })
    expect(made.manifest.mappedFiles).toMatchObject([{ path: library, inode: String(ino), mtimeNs: String(mtimeNs) }])
    expect(made.currentPath(library)).toBe(library)
  })

  test('with an older warmfork does not know a newer format', async () => {
    const bytes = forged(await archive(), (contents) => {
      contents.formatVersion = 2
      contents.news = true
    })
    expect(await refusal(bytes)).toContain('its format is version 2 and this warmfork knows version 1')
  })
})

describe('a digest', () => {
  test('pins an archive', async () => {
    const { bytes, digest } = await exported(generation, { compress: 'gzip' })
    expect(digest).toMatch(/^sha256:[0-9a-f]{64}$/)
    expect((await imported(other, bytes, { digest })).number).toBe(1)
  })

  test('refuses any other, before anything else in it is looked at', async () => {
    const { digest } = await exported(generation)
    const bytes = forged((await exported(generation)).bytes, (contents) => {
      contents.formatVersion = 99
    })
    const error = await failure('ARCHIVE_INVALID', () => imported(other, bytes, { digest }))
    expect(error.happened).toMatch(/^its digest is sha256:[0-9a-f]+ and sha256:[0-9a-f]+ was asked for$/)
    expect(entriesOf(other)).toEqual([])
  })
})

describe('a signature', () => {
  const pair = () => generateKeyPairSync('ed25519')
  const pem = (key: ReturnType<typeof pair>['privateKey']) => key.export({ type: 'pkcs8', format: 'pem' }) as string

  test('is accepted from the key that is asked for, and seen by who asks for none', async () => {
    const { privateKey: key, publicKey: trusted } = pair()
    const { bytes } = await exported(generation, { sign: key })
    expect((await imported(other, bytes, { verify: trusted })).number).toBe(1)
    const file = join(shop.directory, 'signed.tar')
    const from = { name: 'web', store: shop.root, file, sign: pem(key) }
    const { signedBy } = await exportGeneration(from)
    expect(signedBy).toMatch(/^sha256:[0-9a-f]{64}$/)
  })

  test.each(['none', 'another'])('of %s key is refused where one is asked for', async (which) => {
    const { bytes } = await exported(generation, which === 'none' ? {} : { sign: pair().privateKey })
    const error = await failure('ARCHIVE_INVALID', () => imported(other, bytes, { verify: pair().publicKey }))
    expect(error.happened).toMatch(which === 'none' ? /^it is not signed$/ : /^it was signed with another key/)
    expect(entriesOf(other)).toEqual([])
  })

  test('of another list is refused by everybody', async () => {
    const { bytes } = await exported(generation, { sign: pair().privateKey })
    const moved = forged(bytes, (contents) => {
      contents.generation.warnings = ['changed']
    })
    const error = await failure('ARCHIVE_INVALID', () => imported(other, moved))
    expect(error.happened).toBe('its signature is not one of its list')
  })

  test('is made with an ed25519 key and no other', async () => {
    await failure('BAD_OPTION', () => privateKey('no key'))
    const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 })
    await failure('BAD_OPTION', () => privateKey(rsa.privateKey))
    await failure('BAD_OPTION', () => publicKey(rsa.publicKey))
  })
})

describe('a file', () => {
  const file = () => join(shop.directory, 'archive.tar')
  const from = () => ({ name: 'web', store: shop.root, file: file() })
  const left = () => readdirSync(shop.directory).filter((name) => name.includes('archive'))

  test.skipIf(process.geteuid?.() !== 0)(
    'of a worker with an own user gives page files that its group may read',
    async () => {
      const bytes = forged((await exported(generation)).bytes, ({ generation }) => {
        Object.assign(generation.surroundings, { uid: 65534, gid: 65534 })
      })
      writeFileSync(file(), bytes)
      const { name, number } = await importGeneration({ file: file(), store: shop.root, name: 'worker' })
      const directory = join(shop.root, name, 'generations', String(number))
      expect(statSync(directory)).toMatchObject({ mode: 0o40710, gid: 65534 })
      expect(statSync(join(directory, PAGE_FILE))).toMatchObject({ mode: 0o100440, uid: 0, gid: 65534 })
    },
  )

  test('has the generation that is pinned, else the newest that was not rejected', async () => {
    await createWhole(store)
    const verdicts = Verdicts.read(store.directory)
    const numberOf = async () => (await exportGeneration({ ...from(), force: true })).number
    expect(await numberOf()).toBe(2)
    await verdicts.pin(1)
    expect(await numberOf()).toBe(1)
    await verdicts.pin(undefined)
    await verdicts.reject(2, 'it is slow')
    expect(await numberOf()).toBe(1)
    await verdicts.reject(1, 'it is slow')
    await failure('GENERATION_NOT_FOUND', numberOf)
  })

  test('that is there is not replaced unless that is asked for', async () => {
    writeFileSync(file(), 'precious')
    const error = await failure('BAD_OPTION', () => exportGeneration(from()))
    expect(error.remedy).toContain('--force')
    expect(readFileSync(file(), 'utf8')).toBe('precious')
    const { archiveBytes } = await exportGeneration({ ...from(), force: true })
    expect(statSync(file())).toMatchObject({ size: archiveBytes, mode: 0o100600 })
    expect(left()).toEqual(['archive.tar'])
  })

  test('that is there stays when the export fails', async () => {
    writeFileSync(file(), 'precious')
    chmodSync(join(generation.directory, PAGE_FILE), 0o600)
    writeFileSync(join(generation.directory, PAGE_FILE), Buffer.alloc(8), { flag: 'r+' })
    await failure('GENERATION_CORRUPT', () => exportGeneration({ ...from(), force: true }))
    expect(readFileSync(file(), 'utf8')).toBe('precious')
    expect(left()).toEqual(['archive.tar'])
  })

  test('is removed when the export is ended', async () => {
    await expect(exportGeneration({ ...from(), signal: AbortSignal.abort() })).rejects.toThrow('aborted')
    expect(left()).toEqual([])
  })

  test('of an export that was killed is removed by the next one', async () => {
    writeFileSync(join(shop.directory, '.archive.tar.1-7-0123456789ab.part'), 'half')
    await exportGeneration(from())
    expect(left()).toEqual(['archive.tar'])
  })

  test.each(['/no/such/directory/archive.tar', '/proc/archive.tar'])(
    '%s cannot be written, which is said',
    async (path) => {
      const error = await failure('BAD_OPTION', () => exportGeneration({ ...from(), file: path }))
      expect(error.happened).toMatch(/cannot be written: ENOENT/)
    },
  )

  test.each(['/no/such/archive.tar', '/'])('%s cannot be read, which is said', async (path) => {
    await failure('BAD_OPTION', () => importGeneration({ file: path, store: shop.root }))
  })
})

test('an import that is ended leaves nothing', async () => {
  const file = join(shop.directory, 'archive.tar')
  await exportGeneration({ name: 'web', store: shop.root, file })
  const ended = { file, store: shop.root, name: 'third', signal: AbortSignal.abort() }
  await expect(importGeneration(ended)).rejects.toThrow()
  expect(existsSync(join(shop.root, 'third', 'generations', '1'))).toBe(false)
  expect(readdirSync(join(shop.root, 'third', 'generations'))).toEqual([])
})

test.each([true, false])(
  'zstd bounds what a frame may hold, and its frames say it (Node’s own: %s)',
  async (builtIn) => {
    const zstd = openZstd({ builtIn })
    try {
      const raw = Buffer.alloc(1 << 20, 'warmfork ')
      const frame = Buffer.from(await zstd.compress(Buffer.from(raw), 1))
      // Else another version of Node could not read it.
      expect(contentBytes(frame)).toBe(raw.length)
      expect(Buffer.from(await zstd.decompress(frame, raw.length)).equals(raw)).toBe(true)
      await expect(zstd.decompress(frame, raw.length - 1)).rejects.toThrow()
      await expect(zstd.decompress(Buffer.alloc(40, 1), 40)).rejects.toThrow()
    } finally {
      await zstd.close()
    }
  },
)

test('the stretches in an archive are those of the store', async () => {
  const runs = unpacked((await exported(generation)).bytes).find(({ name }) => name.endsWith('.runs'))!
  expect(decodeRuns(runs.content)).toEqual(RUNS)
})

test('a generation that the tests of the store make has no image, which is said', async () => {
  const { bytes } = await exported(await create(store))
  const error = await failure('ARCHIVE_INVALID', () => imported(other, bytes))
  expect(error.happened).toMatch(/^its image does not decode/)
  expect(entriesOf(other)).toEqual([])
})
