import { mkdirSync, mkdtempSync, rmSync, statSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import {
  changes as changed,
  changeWords,
  DEFAULT_GLOBS,
  decodeWatched,
  encodeWatched,
  type WatchedFiles,
  type WatchOptions,
  watchedFiles,
  withUnknown,
} from '../src/watch.js'

let cwd: string

beforeEach(() => {
  cwd = mkdtempSync(join(tmpdir(), 'warmfork-watch-'))
})

afterEach(() => rmSync(cwd, { recursive: true }))

function write(path: string, content: string): void {
  const whole = join(cwd, path)
  mkdirSync(join(whole, '..'), { recursive: true })
  writeFileSync(whole, content)
}

const changes = (before: WatchedFiles, now: WatchedFiles) => changeWords(changed(before, now))
const look = (options: Partial<WatchOptions> = {}) => watchedFiles({ cwd, globs: ['**/*.js'], ...options })

describe('the files that are watched', () => {
  test('are those that the globs name, relative to the directory', async () => {
    write('a.js', 'one')
    write('src/b.js', 'two')
    write('src/c.txt', 'no code')
    write('test/d.js', 'left out')
    expect([...(await look({ globs: ['**/*.js', '!test/**'] })).keys()]).toEqual(['a.js', 'src/b.js'])
  })

  test('are those that are given by name too, wherever they lie, as far as they are there', async () => {
    write('server', 'a script')
    const elsewhere = mkdtempSync(join(tmpdir(), 'warmfork-watch-'))
    try {
      writeFileSync(join(elsewhere, 'conf'), 'x')
      const files = ['server', join(elsewhere, 'conf'), '--port', '80', join(cwd, 'server')]
      expect([...(await look({ globs: [], files })).keys()]).toEqual([join(elsewhere, 'conf'), 'server'])
    } finally {
      rmSync(elsewhere, { recursive: true })
    }
  })

  test('are, where nobody says, what programs are written in, without what others have written', async () => {
    for (const path of ['app.py', 'lib/x.rb', 'package-lock.json', 'views/a.ejs', 'app.log', 'data.sqlite'])
      write(path, path)
    for (const path of ['node_modules/x/index.js', 'a/node_modules/y/index.js', '.git/hooks/x.sh', 'log/x.json'])
      write(path, path)
    expect([...(await look({ globs: DEFAULT_GLOBS })).keys()]).toEqual([
      'app.py',
      'lib/x.rb',
      'package-lock.json',
      'views/a.ejs',
    ])
  })

  test('are followed through links, also where a link leads in a circle or nowhere', async () => {
    write('releases/1/a.js', 'one')
    symlinkSync('releases/1', join(cwd, 'current'))
    symlinkSync('.', join(cwd, 'releases/1/circle'))
    symlinkSync('gone.js', join(cwd, 'broken.js'))
    const before = await look({ globs: ['current/*.js', '*.js', 'releases/**/*.js'] })
    expect(before.has('current/a.js')).toBe(true)
    expect(before.has('broken.js')).toBe(false)
  })

  test('do not lie in directories that are left out, with whatever names', async () => {
    write('a.js', '')
    write('store (1)/b.js', '')
    write('stores/c.js', '')
    expect([...(await look({ except: [join(cwd, 'store (1)'), '/elsewhere', cwd] })).keys()]).toEqual([
      'a.js',
      'stores/c.js',
    ])
  })

  test('must not be more than the limits say', async () => {
    write('a.js', '12345')
    write('b.js', '12345')
    await expect(look({ limits: { files: 1 } })).rejects.toThrow(/BAD_OPTION: .*`reuse.watch`.*there are 2 of them/)
    await expect(look({ limits: { bytes: 9 } })).rejects.toThrow(/BAD_OPTION: .*more than 9 bytes/)
  })
})

describe('changes', () => {
  test('name what was added, changed and removed', async () => {
    for (const name of ['a', 'b', 'c']) write(`${name}.js`, name)
    const before = await look()
    write('b.js', 'B')
    rmSync(join(cwd, 'c.js'))
    write('d.js', 'd')
    expect(changes(before, await look())).toEqual(['b.js was changed', 'd.js was added', 'c.js was removed'])
  })

  test('are none where a file was written again with the same content', async () => {
    write('a.js', 'same')
    const before = await look()
    rmSync(join(cwd, 'a.js'))
    write('a.js', 'same')
    expect(changes(before, await look({ known: before }))).toEqual([])
  })

  test('are seen where size and time of the change are as they were', async () => {
    write('a.js', 'one')
    // Long ago, for what is known of it by a look to be trusted at all.
    const before = await settled()
    const { atime, mtime } = statSync(join(cwd, 'a.js'))
    writeFileSync(join(cwd, 'a.js'), 'two')
    utimesSync(join(cwd, 'a.js'), atime, mtime)
    expect(changes(before, await look({ known: before }))).toEqual(['a.js was changed'])
  })

  test('are seen of a file that was changed twice in one moment', async () => {
    write('a.js', 'one')
    const before = await look()
    expect(before.get('a.js')?.seen).toBe(undefined)
    writeFileSync(join(cwd, 'a.js'), 'two')
    expect(changes(before, await look({ known: before }))).toEqual(['a.js was changed'])
  })

  test('during a boot leave files that fit no later, whatever becomes of them', async () => {
    write('a.js', 'one')
    write('b.js', 'same')
    const before = await look()
    write('a.js', 'two')
    const kept = withUnknown(before, changed(before, await look()))
    expect(changes(kept, await look())).toEqual(['a.js was changed'])
    write('a.js', 'one')
    expect(changes(kept, await look())).toEqual(['a.js was changed'])
    rmSync(join(cwd, 'a.js'))
    expect(changes(kept, await look())).toEqual(['a.js was removed'])
  })

  test('are told for the first few, and counted for the others', async () => {
    const before = await look()
    for (let i = 0; i < 9; i++) write(`${i}.js`, '')
    expect(changes(before, await look())).toEqual([...[0, 1, 2, 3, 4].map((i) => `${i}.js was added`), 'and 4 more'])
  })
})

test('a file that was not touched is not read again', async () => {
  write('a.js', 'one')
  const before = await settled()
  const pretended = new Map([...before].map(([path, file]) => [path, { ...file, sha256: '0'.repeat(64) }]))
  expect((await look({ known: pretended })).get('a.js')?.sha256).toBe('0'.repeat(64))
})

test('files can be kept as a text, with names of any kind', async () => {
  write('a b.js', 'x')
  write('line\nbreak".js', 'y')
  const files = await look()
  expect(files.size).toBe(2)
  expect(decodeWatched(encodeWatched(files))).toEqual(files)
  expect(() => decodeWatched(`${encodeWatched(files).slice(0, -9)}\n`)).toThrow(SyntaxError)
})

/** What is seen of files that have stayed as they are for a while. */
async function settled() {
  await new Promise((resolve) => setTimeout(resolve, 60))
  const files = await look({ limits: { settledMs: 30 } })
  expect(files.get('a.js')?.seen).toBeDefined()
  return files
}
