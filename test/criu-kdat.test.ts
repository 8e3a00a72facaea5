import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { type Criu, findCriu } from '../src/engines/criu/binary.js'
import { installCriu } from '../src/engines/criu/install.js'
import { type CacheStamp, isFreshStamp, type KernelCache } from '../src/engines/criu/kdat.js'

const TSX = new URL('../node_modules/.bin/tsx', import.meta.url).pathname
const KDAT = new URL('../src/engines/criu/kdat.ts', import.meta.url).href
const root = process.geteuid?.() === 0

let criu: Criu
let directory: string

beforeAll(async () => {
  criu = await installCriu().catch(() => findCriu())
}, 180_000)

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-test-kdat-'))
})

afterEach(() => rmSync(directory, { recursive: true, force: true }))

/**
 * Runs a shell script with a /run of its own, on a disk or on a tmpfs, so that no other criu is disturbed. `$ENSURE` makes
 * the cache and prints what came of it as a line of JSON.
 */
async function withRun(kind: 'disk' | 'tmpfs', script: string): Promise<{ results: KernelCache[]; text: string }> {
  const code = `
    import { ensureKernelCache } from ${JSON.stringify(KDAT)}
    const criu = ${JSON.stringify(criu)}
    console.log(JSON.stringify(await ensureKernelCache(process.env.CRIU_VERSION ? { ...criu, version: { major: 9, minor: 9, patch: 9 } } : criu)))
  `
  const mount = kind === 'disk' ? `mount --bind ${directory} /run` : 'mount -t tmpfs tmpfs /run'
  const args = ['--mount', '--propagation', 'private', 'sh', '-ec', `${mount}; ${script}`]
  const env = { ...process.env, ENSURE: `${TSX} --input-type=module -e`, CODE: code }
  const { stdout } = await promisify(execFile)('unshare', args, { timeout: 60_000, env })
  const lines = stdout.trim().split('\n')
  return {
    results: lines.filter((line) => line.startsWith('{')).map((line) => JSON.parse(line) as KernelCache),
    text: lines.filter((line) => !line.startsWith('{')).join('\n'),
  }
}

const ensure = '$ENSURE "$CODE"'

describe('the stamp of a cache on a disk', () => {
  const now: CacheStamp = { bootId: 'boot', kernelRelease: '6.18.0', criuVersion: '4.2.1', sha256: 'abc' }

  it('is fresh only where boot, kernel, criu and content are the same', () => {
    expect(isFreshStamp({ ...now }, now)).toBe(true)
    expect(isFreshStamp(undefined, now)).toBe(false)
    for (const key of Object.keys(now)) expect(isFreshStamp({ ...now, [key]: 'other' }, now)).toBe(false)
  })
})

describe.skipIf(!root)('the kernel cache', () => {
  it('is made once where /run is a disk, and criu takes it', { timeout: 60_000 }, async () => {
    const restoreFails = `${criu.argv.map((part) => `'${part}'`).join(' ')} check -v4 2>&1 | grep -c 'Loaded kdat cache from /run/criu.kdat' || true`
    const { results, text } = await withRun('disk', `${ensure}; ${ensure}; ls /run; ${restoreFails}; ls /run`)
    expect(results.map(({ state }) => state)).toEqual(['made', 'fresh'])
    expect(text.split('\n')).toContain('1')
    expect(text.split('\n').filter((line) => line === 'criu.kdat')).toHaveLength(2)
  })

  it('is replaced after a reboot, for another criu and where it was changed', { timeout: 60_000 }, async () => {
    const steps = [
      ensure,
      `sed -i 's/"bootId":"[^"]*"/"bootId":"of another boot"/' /run/criu.kdat.warmfork.json; ${ensure}`,
      `CRIU_VERSION=other ${ensure}`,
      ensure,
      `echo >> /run/criu.kdat; ${ensure}`,
      ensure,
    ]
    const { results } = await withRun('disk', steps.join('; '))
    expect(results.map(({ state }) => state)).toEqual(['made', 'made', 'made', 'made', 'made', 'fresh'])
  })

  it('is left to criu where /run is a tmpfs, once', { timeout: 60_000 }, async () => {
    const { results, text } = await withRun('tmpfs', `${ensure}; ${ensure}; ls /run`)
    expect(results.map(({ state }) => state)).toEqual(['made', 'fresh'])
    expect(text).toBe('criu.kdat')
  })

  it('is made on a tmpfs although a killed criu has left its temporary file', { timeout: 60_000 }, async () => {
    const { results } = await withRun('tmpfs', `touch -d '1 hour ago' /run/criu.kdat.tmp; ${ensure}; ${ensure}`)
    expect(results.map(({ state }) => state)).toEqual(['made', 'fresh'])
  })

  it('is given up with a reason where it cannot be made, and one of another boot does not stay', {
    timeout: 60_000,
  }, async () => {
    const noMount = `setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin ${ensure}`
    const { results, text } = await withRun('disk', `echo stale > /run/criu.kdat; ${noMount}; ls /run`)
    expect(results[0]).toMatchObject({ state: 'none', reason: expect.stringContaining('/run/criu.kdat') })
    expect(text).not.toMatch(/^criu\.kdat$/m)
  })
})
