import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { CRIU_CAPABILITIES } from '../src/engines/criu/rights.js'
import { parseDockerfile, stagesOf } from './dockerfile-parse.js'

const root = join(import.meta.dirname, '..')
const text = readFileSync(join(root, 'Dockerfile'), 'utf8')
const instructions = parseDockerfile(text)
const stages = stagesOf(instructions)
const image = stages.at(-1)!
const only = (name: string, from = instructions) => from.filter((instruction) => instruction.name === name)
const runs = only('RUN').map(({ text }) => text)
const ignore = readFileSync(join(root, '.dockerignore'), 'utf8')
const entrypoint = readFileSync(join(root, 'scripts/container-entrypoint.sh'), 'utf8')

describe('the Dockerfile', () => {
  test('builds on images with a version, the same in each stage', () => {
    expect(stages.length).toBe(2)
    expect(new Set(stages.map(([from]) => from!.args[0]))).toEqual(new Set(['node:20-bookworm-slim']))
  })

  test('installs from Debian with fresh lists, without recommended packages, and leaves no lists', () => {
    const installing = runs.filter((run) => run.includes('apt-get install'))
    expect(installing.length).toBe(2)
    for (const run of installing) {
      expect(run).toMatch(/^apt-get update +&& apt-get install --yes --no-install-recommends /)
      expect(run).toMatch(/rm -rf \/var\/lib\/apt\/lists\/\*$/)
    }
  })

  test('downloads by apt and npm only', () => {
    expect(only('ADD')).toEqual([])
    expect(runs.filter((run) => /\b(curl|wget|git|pip)\b|https?:/.test(run))).toEqual([])
  })

  test('copies only what exists and what .dockerignore lets through', () => {
    const copied = only('COPY')
      .filter(({ flags }) => !flags.from)
      .flatMap(({ args }) => args.slice(0, -1))
    expect(copied.length).toBeGreaterThan(5)
    expect(copied.filter((path) => !existsSync(join(root, path)))).toEqual([])
    const allowed = ignore.split('\n').filter((line) => line.startsWith('!'))
    expect(copied.filter((path) => !allowed.includes(`!${path.split('/')[0]}`))).toEqual([])
  })

  test('copies from stages that exist', () => {
    const names = stages.map(([from]) => from!.args[2])
    expect(only('COPY').filter(({ flags }) => flags.from && !names.includes(flags.from))).toEqual([])
  })

  test('runs as a user that is not root, which it has made', () => {
    const user = only('USER', image).at(-1)!.args[0]!
    expect(user).not.toMatch(/^(root|0)\b/)
    expect(runs.some((run) => new RegExp(`useradd .* ${user}\\b`).test(run))).toBe(true)
    // What comes after USER is done as that user.
    expect(image.slice(image.indexOf(only('USER', image)[0]!)).filter(({ name }) => name === 'RUN')).toEqual([])
  })

  test('has tini as PID 1, in the form that needs no shell', () => {
    const [entry] = only('ENTRYPOINT', image)
    expect(entry!.json).toBe(true)
    expect(entry!.args.slice(0, 2)).toEqual(['tini', '--'])
    expect(runs.some((run) => /apt-get install .*\btini\b/.test(run))).toBe(true)
    expect(only('CMD', image)[0]!.json).toBe(true)
  })

  test('puts criu where every user of the image finds it', async () => {
    const { SYSTEM_PREFIX } = await import('../src/engines/criu/binary.js')
    expect(runs.some((run) => run.includes('installCriu') && run.includes(`prefix: '${SYSTEM_PREFIX}'`))).toBe(true)
  })

  test('gives the helper exactly the capabilities of criu, and its comments name each', () => {
    const setcap = runs.find((run) => run.includes('setcap'))!
    const given = /setcap (\S+?)=p /.exec(setcap)![1]!.split(',')
    expect(given.sort()).toEqual(CRIU_CAPABILITIES.map((name) => `cap_${name}`).sort())
    const comments = text
      .split('\n')
      .filter((line) => line.startsWith('#'))
      .join('\n')
    expect(CRIU_CAPABILITIES.filter((name) => !comments.includes(`CAP_${name.toUpperCase()}`))).toEqual([])
    const raised = /^capabilities=(\S+)$/m.exec(entrypoint)![1]!.split(',')
    expect(raised.sort()).toEqual(CRIU_CAPABILITIES.map((name) => `+${name}`).sort())
  })

  test('lets nobody but the group run the helper', () => {
    expect(runs.some((run) => /install -o root -g warmfork -m 0750 \/usr\/bin\/setpriv /.test(run))).toBe(true)
  })
})

describe('the entry point', () => {
  test('is a script that sh can read', () => {
    execFileSync('sh', ['-n', join(root, 'scripts/container-entrypoint.sh')], { timeout: 10_000 })
  })

  test('runs warmfork all the same where the container has no capabilities, and says what is missing', () => {
    const directory = mkdtempSync(join(tmpdir(), 'warmfork-entrypoint-'))
    try {
      for (const [name, script] of [
        ['warmfork', 'printf "<%s>" "$@"'],
        ['id', 'echo 10001'],
      ]) {
        writeFileSync(join(directory, name!), `#!/bin/sh\n${script}\n`, { mode: 0o755 })
      }
      const command = `PATH=${directory}:$PATH sh ${join(root, 'scripts/container-entrypoint.sh')} run -- 'two words' '' 2>&1`
      const output = execFileSync('sh', ['-c', command], { encoding: 'utf8', timeout: 10_000 })
      expect(output).toMatch(/--cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE --cap-add SYS_ADMIN/)
      expect(output).toMatch(/<run><--><two words><>$/)
    } finally {
      rmSync(directory, { recursive: true, force: true })
    }
  })
})

describe('the reader of Dockerfiles', () => {
  test('joins continued lines, and knows flags, JSON and comments', () => {
    const [from, copy, run, entry] = parseDockerfile(
      'FROM a AS b\nCOPY --from=b --chmod=0755 x y /z/\n# no\nRUN one \\\n# inside\n  && two\nENTRYPOINT ["a b", "c"]\n',
    )
    expect(from).toMatchObject({ name: 'FROM', args: ['a', 'AS', 'b'], line: 1 })
    expect(copy).toMatchObject({ flags: { from: 'b', chmod: '0755' }, args: ['x', 'y', '/z/'] })
    expect(run!.text).toMatch(/^one +&& two$/)
    expect(entry).toMatchObject({ json: true, args: ['a b', 'c'], line: 7 })
  })

  test('refuses what is no instruction, and a file that ends in the middle of one', () => {
    expect(() => parseDockerfile('FROM')).toThrow('line 1')
    expect(() => parseDockerfile('RUN a \\\n')).toThrow('line 1')
    expect(() => stagesOf(parseDockerfile('RUN a'))).toThrow('before FROM')
  })
})
