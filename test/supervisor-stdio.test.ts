import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Supervisor } from '../src/supervisor.js'

/** A Node template has its stdin in an epoll set, which takes no regular file; a shell reads its stdin plainly. */
const PROGRAMS = {
  node: [
    process.execPath,
    '-e',
    "process.stdin.on('data', (d) => process.stdout.write('got ' + d)); process.stdin.on('end', () => process.exit(3)); console.log('ready')",
  ],
  sh: ['/bin/sh', '-c', 'echo ready; while read -r line; do echo "got $line"; done; exit 3'],
} as const

describe.each(Object.keys(PROGRAMS) as (keyof typeof PROGRAMS)[])(
  "the caller's descriptors, for a fork of %s",
  (which) => {
    let directory: string
    let supervisor: Supervisor

    beforeAll(async () => {
      directory = mkdtempSync(join(tmpdir(), 'warmfork-stdio-'))
      supervisor = await Supervisor.start({
        command: [...PROGRAMS[which]] as [string, ...string[]],
        engine: 'criu',
        store: join(directory, 'store'),
        ready: { output: /ready/ },
        pool: { size: 0 },
      })
    })

    afterAll(async () => {
      await supervisor?.stop()
      rmSync(directory, { recursive: true, force: true })
    })

    async function forkOn(input: string, outputFlags: string): Promise<{ exit: unknown; output: string }> {
      const output = join(directory, 'output')
      const stdin = openSync(input, 'r')
      const stdout = openSync(output, outputFlags)
      try {
        const child = await supervisor.fork({ stdio: [stdin, stdout, stdout] })
        return { exit: await child.exit, output: readFileSync(output, 'utf8') }
      } finally {
        closeSync(stdin)
        closeSync(stdout)
      }
    }

    it('may be regular files, and its last output is there when its exit is told', async () => {
      const input = join(directory, 'input')
      writeFileSync(input, 'hello\n')
      expect(await forkOn(input, 'w')).toEqual({ exit: { code: 3, signal: null }, output: 'got hello\n' })
    })

    it('append to what a file holds', async () => {
      const input = join(directory, 'input')
      writeFileSync(input, 'more\n')
      writeFileSync(join(directory, 'output'), 'before\n')
      expect((await forkOn(input, 'a')).output).toBe('before\ngot more\n')
    })

    it('may be /dev/null', async () => {
      expect(await forkOn('/dev/null', 'w')).toEqual({ exit: { code: 3, signal: null }, output: '' })
    })

    it('stay open for the caller', async () => {
      const stdin = openSync('/dev/null', 'r')
      const stdout = openSync(join(directory, 'output'), 'w')
      const child = await supervisor.fork({ stdio: [stdin, stdout, stdout] })
      await child.exit
      expect(() => closeSync(stdin)).not.toThrow()
      expect(() => closeSync(stdout)).not.toThrow()
    })
  },
)
