import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { release, tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import {
  compareVersions,
  defaultPrefix,
  findCriu,
  formatVersion,
  isSuitable,
  PRIVATE_MANIFEST,
  parseVersion,
  privateVersions,
  requiredVersion,
  SYSTEM_PREFIX,
} from '../src/engines/criu/binary.js'
import { WarmforkError } from '../src/errors.js'

let directory: string

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-test-binary-'))
  vi.stubEnv('WARMFORK_CRIU', '')
  vi.stubEnv('XDG_CACHE_HOME', join(directory, 'cache'))
})

afterEach(() => {
  vi.unstubAllEnvs()
  rmSync(directory, { recursive: true, force: true })
})

/** A program that answers `--version` as criu does and counts how often it was run. */
function printsVersion(name: string, version: string): string {
  const bin = join(directory, name)
  mkdirSync(bin, { recursive: true })
  const path = join(bin, 'criu')
  writeFileSync(
    path,
    `#!/bin/sh\necho x >> ${join(directory, 'runs')}\necho "Version: ${version}"\necho "GitID: v${version}"\n`,
  )
  chmodSync(path, 0o755)
  return path
}

const runs = () => readFileSync(join(directory, 'runs'), 'utf8').trim().split('\n').length

/** The layout of a private version, with a program in place of criu. */
function privateVersion(prefix: string, version: string): void {
  const root = join(prefix, version)
  mkdirSync(join(root, 'lib'), { recursive: true })
  for (const name of ['lib/ld.so', 'criu']) writeFileSync(join(root, name), '', { mode: 0o755 })
  writeFileSync(
    join(root, PRIVATE_MANIFEST),
    JSON.stringify({ version, loader: 'lib/ld.so', libraryPath: ['lib'], criu: 'criu' }),
  )
}

function errorOf(action: () => unknown): WarmforkError {
  try {
    action()
  } catch (error) {
    if (error instanceof WarmforkError) return error
    throw error
  }
  throw new Error('expected an error')
}

describe('versions', () => {
  it('reads what criu --version prints, and the version of a package', () => {
    expect(parseVersion('Version: 4.2.1\nGitID: v4.2.1\n')).toEqual({ major: 4, minor: 2, patch: 1 })
    expect(parseVersion('Version: 3.17')).toEqual({ major: 3, minor: 17, patch: 0 })
    expect(parseVersion('4.2.1-1+b1')).toEqual({ major: 4, minor: 2, patch: 1 })
    expect(parseVersion('(none)')).toBeUndefined()
    expect(parseVersion('')).toBeUndefined()
  })

  it('compares by number, not by letter', () => {
    const of = (text: string) => parseVersion(text)!
    expect(compareVersions(of('4.10'), of('4.9.1'))).toBeGreaterThan(0)
    expect(compareVersions(of('3.19'), of('4.0'))).toBeLessThan(0)
    expect(compareVersions(of('4.2'), of('4.2.0'))).toBe(0)
  })

  it('asks for 4.2 on kernels from 6.16 on, and for 4.1 before', () => {
    expect(formatVersion(requiredVersion('6.15.9-generic'))).toBe('4.1')
    expect(formatVersion(requiredVersion('6.16.0'))).toBe('4.2')
    expect(formatVersion(requiredVersion('6.18.44-x'))).toBe('4.2')
    expect(formatVersion(requiredVersion('7.0.1'))).toBe('4.2')
    expect(isSuitable({ major: 4, minor: 1, patch: 1 }, '6.1.0-37-amd64')).toBe(true)
    expect(isSuitable({ major: 4, minor: 1, patch: 1 }, '6.18.0')).toBe(false)
    expect(isSuitable({ major: 3, minor: 19, patch: 0 }, '6.1.0')).toBe(false)
  })
})

describe('the private prefix', () => {
  it('is below XDG_DATA_HOME, and a relative one is ignored', () => {
    expect(defaultPrefix({ XDG_DATA_HOME: '/data' }, 1000)).toBe('/data/warmfork/criu')
    expect(defaultPrefix({ XDG_DATA_HOME: 'data' }, 1000)).toMatch(/^\/.*\/\.local\/share\/warmfork\/criu$/)
  })

  it('is one that every user can reach, for root', () => {
    expect(defaultPrefix({ XDG_DATA_HOME: '/data' }, 0)).toBe(SYSTEM_PREFIX)
  })

  it('gives the newest first and passes over what is not complete', () => {
    privateVersion(directory, '4.2')
    privateVersion(directory, '4.10')
    mkdirSync(join(directory, '5.0'))
    mkdirSync(join(directory, '.new-abc'))
    expect(privateVersions(directory).map(({ version }) => formatVersion(version))).toEqual(['4.10', '4.2'])
  })
})

describe('findCriu', () => {
  it('prefers the explicit one', () => {
    const path = printsVersion('explicit', '4.2.1')
    const bin = join(printsVersion('bin', '4.3'), '..')
    expect(findCriu({ criu: path, path: [bin] })).toEqual({
      argv: [path],
      version: { major: 4, minor: 2, patch: 1 },
      source: 'option',
    })
  })

  it('takes the explicit one from WARMFORK_CRIU too', () => {
    const path = printsVersion('explicit', '4.2.1')
    vi.stubEnv('WARMFORK_CRIU', path)
    expect(findCriu().source).toBe('option')
  })

  it('refuses an explicit one that is too old, rather than to use another', () => {
    const path = printsVersion('explicit', '4.1.1')
    privateVersion(directory, '4.2')
    const error = errorOf(() => findCriu({ criu: path, prefix: directory, kernelRelease: '6.18.0' }))
    expect(error.code).toBe('CRIU_TOO_OLD')
    expect(error.message).toContain('4.1.1')
    expect(error.message).toContain('4.2 or newer')
  })

  it('refuses an explicit one that is not there', () => {
    const error = errorOf(() => findCriu({ criu: join(directory, 'nowhere') }))
    expect(error.code).toBe('CRIU_MISSING')
    expect(error.message).toContain(join(directory, 'nowhere'))
  })

  it('passes over one in PATH that is too old, for the private one', () => {
    const bin = join(printsVersion('bin', '3.17'), '..')
    privateVersion(join(directory, 'prefix'), '4.2')
    const criu = findCriu({ path: [bin], prefix: join(directory, 'prefix') })
    expect(criu.source).toBe('private')
    expect(criu.argv).toEqual([
      join(directory, 'prefix/4.2/lib/ld.so'),
      '--library-path',
      join(directory, 'prefix/4.2/lib'),
      join(directory, 'prefix/4.2/criu'),
    ])
  })

  it('prefers a suitable one in PATH to the private one', () => {
    const path = printsVersion('bin', '4.2')
    privateVersion(join(directory, 'prefix'), '4.3')
    expect(findCriu({ path: [join(path, '..')], prefix: join(directory, 'prefix') })).toMatchObject({
      argv: [path],
      source: 'path',
    })
  })

  it('says which ones were too old', () => {
    const path = printsVersion('bin', '3.17')
    const error = errorOf(() => findCriu({ path: [join(path, '..')], prefix: join(directory, 'prefix') }))
    expect(error.code).toBe('CRIU_TOO_OLD')
    expect(error.message).toContain(`${path} (3.17)`)
    expect(error.message).toContain('doctor --install')
  })

  it('says where it looked when there is none', () => {
    const error = errorOf(() => findCriu({ path: [directory], prefix: join(directory, 'prefix') }))
    expect(error.code).toBe('CRIU_MISSING')
    expect(error.message).toContain(join(directory, 'prefix'))
    expect(error.message).toContain('doctor --install')
  })

  it('says of one that does not start why it is not used', () => {
    const path = join(directory, 'criu')
    writeFileSync(path, '#!/bin/sh\necho broken >&2\nexit 1\n', { mode: 0o755 })
    const error = errorOf(() => findCriu({ path: [directory], prefix: join(directory, 'prefix') }))
    expect(error.code).toBe('CRIU_MISSING')
    expect(error.message).toContain(path)
  })

  it('runs a criu once, until the file changes', () => {
    const path = printsVersion('bin', '4.2')
    const look = () => findCriu({ criu: path, kernelRelease: release() }).version.minor
    expect([look(), look(), look()]).toEqual([2, 2, 2])
    expect(runs()).toBe(1)
    writeFileSync(path, `#!/bin/sh\necho x >> ${join(directory, 'runs')}\necho "Version: 4.30.1"\n`)
    expect(look()).toBe(30)
    expect(runs()).toBe(2)
  })
})
