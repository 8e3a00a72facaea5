/** `warmfork export` and `import` for people: what they say, and with which status they end. */
import { generateKeyPairSync } from 'node:crypto'
import { existsSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { Terminal } from './cli-harness.js'
import { createWhole } from './fixtures/archives.js'
import { Workshop } from './fixtures/generations.js'

const terminal = new Terminal()
const shop = new Workshop()
const store = ['--store', shop.root]
const inPlace = (name: string) => join(shop.directory, name)
const exporting = (...args: string[]) => terminal.call(['export', ...args, ...store, '--name', 'web', ...terminal.here])
const importing = (...args: string[]) => terminal.call(['import', ...args, ...store])

beforeAll(async () => {
  await createWhole(await shop.open(), { dataBytes: 4 << 20 })
  const { privateKey, publicKey } = generateKeyPairSync('ed25519')
  writeFileSync(inPlace('key.pem'), privateKey.export({ type: 'pkcs8', format: 'pem' }))
  writeFileSync(inPlace('pub.pem'), publicKey.export({ type: 'spki', format: 'pem' }))
})

afterAll(async () => {
  await shop[Symbol.asyncDispose]()
  await terminal.leave()
})

test('what was exported and signed is imported under another name, and both say so', async () => {
  const file = inPlace("it's signed.tar.zst")
  const exported = await exporting('-o', file, '--sign', inPlace('key.pem'))
  expect(exported).toMatchObject({ code: 0, stderr: '' })
  const said =
    /^exported generation 1 of web: \S+ MiB, of \S+, in \S+\ndigest (sha256:\w{64})\nsigned by (sha256:\w{64})\n$/
  const [, digest = '', key = ''] = said.exec(exported.stdout)!
  const imported = await importing(file, '--name', 'other', '--digest', digest, '--verify', inPlace('pub.pem'))
  expect(imported).toMatchObject({ code: 0, stderr: '' })
  expect(imported.stdout).toMatch(
    /^imported generation 1 of other: .*\nit was generation 1 of web, made .*\ndigest sha256:/,
  )
  expect(imported.stdout).toMatch(new RegExp(`\\nsigned by ${key}\n$`))
  expect((await importing(file, '--name', 'other')).stdout).toContain(`signed by ${key} (not verified)`)
})

test.each([
  ['without a file', [], "required option '-o, --output <file>' not specified"],
  ['over a file that is there', ['-o', inPlace('key.pem')], 'is there already'],
  ['with a key that is none', ['-o', inPlace('x.tar'), '--sign', inPlace('pub.pem')], 'it is no key in the PEM format'],
  ['with a key that is not there', ['-o', inPlace('x.tar'), '--sign', '/no/key'], 'no such file or directory'],
])('an export %s is a usage error', async (_, args, words) => {
  const { code, stderr } = await exporting(...args)
  expect(stderr).toContain(words)
  expect(code).toBe(2)
  expect(existsSync(inPlace('x.tar'))).toBe(false)
})

test('an import under the name of a supervisor that runs says whose store it is', async () => {
  const file = inPlace('locked.tar')
  await exporting('-o', file)
  const { code, stderr } = await importing(file)
  expect(stderr).toMatch(/\(STORE_LOCKED\)\n {2}process \d+ is its supervisor/)
  expect(code).toBe(1)
})

test('an import of what is no archive has status 1, and JSON where that is asked for', async () => {
  const { code, stderr } = await importing(inPlace('key.pem'), '--name', 'third', '--json')
  expect(JSON.parse(stderr)).toMatchObject({ code: 'ARCHIVE_INVALID' })
  expect(code).toBe(1)
})

test('an export that gets a signal removes what it has begun', async () => {
  const file = inPlace('ended.tar')
  const slow = terminal.spawn(['export', '-o', file, ...store, '--name', 'web', ...terminal.here], 'pipe')
  const ended = new Promise((resolve) => slow.once('exit', resolve))
  const begun = () => readdirSync(shop.directory).some((name) => name.startsWith('.ended.tar.'))
  while (slow.exitCode === null && !begun()) await new Promise((resolve) => setTimeout(resolve, 1))
  slow.kill('SIGTERM')
  await ended
  expect(begun()).toBe(false)
  // It may have been quicker.
  expect(slow.exitCode === 0 ? existsSync(file) : slow.exitCode).toBe(slow.exitCode === 0 ? true : 143)
})
