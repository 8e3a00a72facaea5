import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import { debianMirrors, parseDeb822, parseOneLine, readAptSources } from '../src/engines/criu/apt-sources.js'
import { findCriu, PRIVATE_MANIFEST, parseVersion } from '../src/engines/criu/binary.js'
import { installCriu, installHint } from '../src/engines/criu/install.js'

const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'

let directory: string

beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-test-install-'))
})

afterAll(() => rmSync(directory, { recursive: true, force: true }))

describe("apt's sources", () => {
  it('are read in the one-line form', () => {
    const text = [
      '# a comment',
      'deb http://mirror.example/debian bookworm main contrib # and another',
      'deb-src http://mirror.example/debian bookworm main',
      `deb [arch=amd64 signed-by=${KEYRING}] https://mirror.example/debian/ bookworm-updates main`,
      'deb [trusted=yes] file:/srv/repo ./',
      '',
    ].join('\n')
    expect(parseOneLine(text)).toEqual([
      { uri: 'http://mirror.example/debian', suites: ['bookworm'], components: ['main', 'contrib'], signedBy: [] },
      {
        uri: 'https://mirror.example/debian/',
        suites: ['bookworm-updates'],
        components: ['main'],
        signedBy: [KEYRING],
      },
      { uri: 'file:/srv/repo', suites: ['./'], components: [], signedBy: [] },
    ])
  })

  it('are read in the deb822 form, with comments, continued lines and several URIs', () => {
    const text = [
      'Types: deb deb-src',
      '# a comment inside',
      'URIs: http://one.example/debian',
      ' http://two.example/debian',
      'Suites: bookworm bookworm-updates',
      'Components: main',
      `Signed-By: ${KEYRING}`,
      '',
      'Types: deb-src',
      'URIs: http://sources.example/debian',
      'Suites: bookworm',
      'Components: main',
      '',
      'Enabled: no',
      'Types: deb',
      'URIs: http://disabled.example/debian',
      'Suites: bookworm',
      'Components: main',
    ].join('\n')
    const common = { suites: ['bookworm', 'bookworm-updates'], components: ['main'], signedBy: [KEYRING] }
    expect(parseDeb822(text)).toEqual([
      { uri: 'http://one.example/debian', ...common },
      { uri: 'http://two.example/debian', ...common },
    ])
  })

  it('leave out a key that stands in the file itself', () => {
    const text = [
      'Types: deb',
      'URIs: http://mirror.example/debian',
      'Suites: bookworm',
      'Components: main',
      'Signed-By:',
      ' -----BEGIN PGP PUBLIC KEY BLOCK-----',
      ' .',
      ' mDMEXEXAMPLE/KEY+',
      ' -----END PGP PUBLIC KEY BLOCK-----',
    ].join('\n')
    expect(parseDeb822(text)[0]!.signedBy).toEqual([])
  })

  it('give the mirror of the main archive: not security, not third parties with names of Debian', () => {
    const sources = parseOneLine(
      [
        `deb [signed-by=/usr/share/keyrings/third.gpg] https://apt.third.example bookworm main`,
        'deb [signed-by=/etc/apt/keyrings/docker.asc] https://containers.example/linux/debian bookworm stable',
        'deb http://security.example/debian-security bookworm-security main',
        'deb cdrom:[Debian]/ bookworm main',
        'deb http://named.example/debian/ bookworm main',
        'deb http://named.example/debian bookworm-updates main',
        `deb [signed-by=${KEYRING}] http://signed.example/mirror bookworm main`,
      ].join('\n'),
    )
    expect(debianMirrors(sources).map(({ uri }) => uri)).toEqual([
      'http://signed.example/mirror',
      'http://named.example/debian/',
    ])
  })

  it('are gathered from all files that apt reads, and from no others', () => {
    const etc = join(directory, 'etc')
    mkdirSync(join(etc, 'sources.list.d'), { recursive: true })
    writeFileSync(join(etc, 'sources.list'), 'deb http://a.example/debian bookworm main\n')
    writeFileSync(join(etc, 'sources.list.d/b.list'), 'deb http://b.example/debian bookworm main\n')
    const paragraph = 'Types: deb\nURIs: http://c.example/debian\nSuites: bookworm\nComponents: main\n'
    writeFileSync(join(etc, 'sources.list.d/c.sources'), paragraph)
    writeFileSync(join(etc, 'sources.list.d/d.list.save'), 'deb http://d.example/debian bookworm main\n')
    const found = readAptSources(etc).map(({ uri }) => uri)
    expect(found).toEqual(['http://a.example/debian', 'http://b.example/debian', 'http://c.example/debian'])
  })
})

describe('installCriu', () => {
  it('brings a criu that starts, finds its work done the second time, and leaves nothing else behind', {
    timeout: 180_000,
  }, async () => {
    const prefix = join(directory, 'prefix')
    const before = readdirSync(tmpdir()).filter((name) => name.startsWith('warmfork-apt-'))
    const steps: string[] = []
    // Two at once take turns.
    const [first, second] = await Promise.all([
      installCriu({ prefix, onProgress: (line) => steps.push(line) }),
      installCriu({ prefix, onProgress: (line) => steps.push(line) }),
    ])
    expect(second).toEqual(first)
    expect(steps.filter((line) => line.startsWith('installed'))).toHaveLength(1)

    const said = execFileSync(first.argv[0]!, [...first.argv.slice(1), '--version'], {
      encoding: 'utf8',
      timeout: 10_000,
    })
    expect(parseVersion(said)).toEqual(first.version)
    expect(findCriu({ prefix, path: [] })).toEqual(first)

    steps.length = 0
    const start = performance.now()
    expect(await installCriu({ prefix, onProgress: (line) => steps.push(line) })).toEqual(first)
    expect(performance.now() - start).toBeLessThan(500)
    expect(steps).toEqual([])
    expect(readdirSync(prefix).filter((name) => name.startsWith('.new-'))).toEqual([])
    expect(readdirSync(tmpdir()).filter((name) => name.startsWith('warmfork-apt-'))).toEqual(before)
  })

  it('replaces a version that does not suit, what was cut short too, but keeps one that is running', {
    timeout: 180_000,
  }, async () => {
    const prefix = join(directory, 'old')
    for (const version of ['4.1', '4.1.1']) {
      const root = join(prefix, version)
      mkdirSync(root, { recursive: true })
      // A copy of this very program, so that a process of it can run.
      execFileSync('cp', [process.execPath, join(root, 'loader')])
      writeFileSync(
        join(root, PRIVATE_MANIFEST),
        JSON.stringify({ version, loader: 'loader', libraryPath: ['.'], criu: 'loader' }),
      )
    }
    mkdirSync(join(prefix, '.new-cut'))
    const running = spawn(join(prefix, '4.1.1/loader'), ['-e', 'setInterval(() => {}, 1e6)'], { stdio: 'ignore' })
    try {
      await once(running, 'spawn')
      const criu = await installCriu({ prefix, kernelRelease: '6.18.0' })
      expect(criu.version.minor).toBeGreaterThanOrEqual(2)
      expect(existsSync(join(prefix, '4.1'))).toBe(false)
      expect(existsSync(join(prefix, '4.1.1'))).toBe(true)
      expect(existsSync(join(prefix, '.new-cut'))).toBe(false)
    } finally {
      const ended = once(running, 'exit')
      running.kill('SIGKILL')
      await ended
    }
  })

  it("says apt's words where the mirror cannot be reached", { timeout: 120_000 }, async () => {
    const etc = join(directory, 'unreachable')
    mkdirSync(etc)
    writeFileSync(join(etc, 'sources.list'), `deb [signed-by=${KEYRING}] http://127.0.0.1:9/debian bookworm main\n`)
    const prefix = join(directory, 'unreached')
    const installing = installCriu({ prefix, aptEtc: etc })
    await expect(installing).rejects.toMatchObject({
      code: 'INSTALL_FAILED',
      output: expect.stringContaining('127.0.0.1'),
    })
    expect(readdirSync(prefix)).toEqual(['.lock'])
  })

  it('ends at its time-out and leaves nothing half done', async () => {
    const prefix = join(directory, 'late')
    await expect(installCriu({ prefix, timeoutMs: 1 })).rejects.toMatchObject({ code: 'INSTALL_FAILED' })
    expect(readdirSync(prefix)).toEqual(['.lock'])
  })

  it("names the distribution's own way where there is no apt", async () => {
    vi.stubEnv('PATH', directory)
    try {
      const installing = installCriu({ prefix: join(directory, 'no-apt') })
      await expect(installing).rejects.toMatchObject({
        code: 'INSTALL_FAILED',
        happened: expect.stringContaining('apt-get'),
      })
    } finally {
      vi.unstubAllEnvs()
    }
    expect(installHint('NAME="Fedora Linux"\nID=fedora\n')).toContain('dnf install criu')
    expect(installHint('ID="rocky"\nID_LIKE="rhel centos fedora"\n')).toContain('dnf install criu')
    expect(installHint('ID=alpine\n')).toContain('apk add criu')
    expect(installHint('ID=arch\n')).toContain('pacman -S criu')
    expect(installHint('')).toContain('WARMFORK_CRIU')
  })
})
