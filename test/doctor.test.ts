import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import pc from 'picocolors'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest'
import { formatResult, formatVerdict } from '../src/cli/doctor.js'
import { type CheckResult, type DoctorReport, doctor } from '../src/doctor/doctor.js'
import { judgeCapabilities, judgeKernel, judgeOpenFiles, judgePidMax } from '../src/doctor/kernel.js'
import { checkGuard, checkInit, checkShim } from '../src/doctor/native.js'
import { judgeCopyMeans, judgeSpace, mountFor } from '../src/doctor/store.js'
import { tryCriu } from '../src/doctor/trial.js'
import { type Criu, findCriu } from '../src/engines/criu/binary.js'
import { allPids, stat } from '../src/linux/proc.js'

const TSX = new URL('../node_modules/.bin/tsx', import.meta.url).pathname
const COMMAND = new URL('../src/cli/doctor.ts', import.meta.url).href
const root = process.geteuid?.() === 0

let directory: string
let criu: Criu

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'warmfork-test-doctor-'))
  await doctor({ install: true, store: directory })
  criu = findCriu()
}, 180_000)

afterAll(() => rmSync(directory, { recursive: true, force: true }))

const resultOf = (report: DoctorReport, name: string): CheckResult =>
  report.checks.find((result) => result.name === name)!

/** Runs `warmfork doctor` as a program of its own. */
function cli(
  args: readonly string[],
  env: Record<string, string> = {},
  prefix: readonly string[] = [],
): Promise<{ status: number; stdout: string; stderr: string }> {
  const code = `
    import { doctorCommand } from ${JSON.stringify(COMMAND)}
    await doctorCommand().parseAsync(process.argv.slice(1), { from: 'user' })
  `
  const [command, ...rest] = [...prefix, TSX, '--input-type=module', '-e', code, '--', ...args]
  return new Promise((done) => {
    execFile(command!, rest, { timeout: 120_000, env: { ...process.env, ...env } }, (error, stdout, stderr) => {
      done({ status: error ? Number(error.code) : 0, stdout, stderr })
    })
  })
}

describe('the doctor', () => {
  it.skipIf(!root)('finds that forks work here, by a trial', { timeout: 60_000 }, async () => {
    const report = await doctor({ store: directory })
    expect(report.checks.filter(({ status, name }) => status === 'fail' && name !== 'guard')).toEqual([])
    expect(resultOf(report, 'trial').found).toMatch(/^a process was dumped in \d+ ms and restored in \d+ ms/)
    expect(resultOf(report, 'criu').status).toBe('ok')
    expect(resultOf(report, 'store').found).toContain(directory)
  })

  it('says each thing in one line', { timeout: 60_000 }, async () => {
    const report = await doctor({ store: directory })
    for (const { found, cost, remedy } of report.checks) expect(`${found}${cost}${remedy}`).not.toContain('\n')
  })

  it('says of a missing criu how to get one, and does not try a fork then', { timeout: 60_000 }, async () => {
    const report = await doctor({ store: directory, criu: { path: [], prefix: join(directory, 'none') } })
    expect(report.forksWork).toBe(false)
    expect(resultOf(report, 'criu')).toMatchObject({
      status: 'fail',
      remedy: expect.stringContaining('doctor --install'),
    })
    expect(resultOf(report, 'trial')).toBeUndefined()
  })

  it('says what criu said where a fork does not work', { timeout: 60_000 }, async () => {
    const broken = join(directory, 'criu')
    // Stands in for a criu on a machine that does not let it work.
    writeFileSync(
      broken,
      '#!/bin/sh\n[ "$1" = --version ] && echo Version: 4.2.1 && exit\necho "no such luck: not permitted" >&2\nexit 1\n',
    )
    chmodSync(broken, 0o755)
    const report = await doctor({ store: directory, criu: { criu: broken } })
    expect(report.forksWork).toBe(false)
    expect(resultOf(report, 'trial')).toMatchObject({
      status: 'fail',
      found: expect.stringContaining('no such luck: not permitted'),
    })
  })

  it('installs a criu first when asked to, and tells the steps', { timeout: 180_000 }, async () => {
    const prefix = join(directory, 'prefix')
    const steps: string[] = []
    const report = await doctor({
      store: directory,
      install: true,
      criu: { path: [], prefix },
      onProgress: (line) => steps.push(line),
    })
    expect(resultOf(report, 'criu')).toMatchObject({ status: 'ok', found: expect.stringContaining(prefix) })
    expect(steps.at(-1)).toContain('installed criu')
  })

  it('reports an installation that failed instead of throwing', { timeout: 60_000 }, async () => {
    const prefix = join(directory, 'a-file')
    writeFileSync(prefix, '')
    const report = await doctor({ store: directory, install: true, criu: { path: [], prefix } })
    expect(report.forksWork).toBe(false)
    expect(resultOf(report, 'criu')).toMatchObject({ status: 'fail', found: expect.stringContaining('EEXIST') })
  })

  it('sees a store that others can write to', { timeout: 60_000 }, async () => {
    const store = join(directory, 'open')
    mkdirSync(store)
    chmodSync(store, 0o777)
    const result = resultOf(await doctor({ store }), 'store')
    expect(result.status).toBe('fail')
    expect(result.remedy).toContain(`chmod 0700 ${store}`)
  })

  it('looks at a store that is not there yet without making it', { timeout: 60_000 }, async () => {
    const store = join(directory, 'not/yet')
    const result = resultOf(await doctor({ store }), 'store')
    expect(result).toMatchObject({ status: 'ok', found: expect.stringContaining('not made yet') })
    expect(existsSync(join(directory, 'not'))).toBe(false)
    expect(readdirSync(directory).filter((name) => name.startsWith('.warmfork-doctor-'))).toEqual([])
  })

  it.skipIf(!root)('tries whether programs may be executed from the store', { timeout: 60_000 }, async () => {
    const mount = 'mount -t tmpfs -o noexec tmpfs /mnt'
    const inNamespace = ['unshare', '--mount', '--propagation', 'private', 'sh', '-ec', `${mount}; exec "$@"`, 'sh']
    const { status, stdout } = await cli(['--json', '--store', '/mnt'], {}, inNamespace)
    expect(status).toBe(1)
    const result = resultOf(JSON.parse(stdout), 'store exec')
    expect(result).toMatchObject({
      status: 'fail',
      found: expect.stringContaining('/mnt'),
      remedy: expect.stringContaining('remount,exec'),
    })
  })
})

describe.skipIf(!root)('the trial', () => {
  let temporary: string

  beforeEach(() => {
    temporary = mkdtempSync(join(directory, 'tmp-'))
    vi.stubEnv('TMPDIR', temporary)
  })

  afterEach(() => {
    vi.unstubAllEnvs()
  })

  const children = () => allPids().filter((pid) => stat(pid)?.ppid === process.pid && stat(pid)?.comm !== 'esbuild')

  it('leaves no process, no descriptor and no file', { timeout: 60_000 }, async () => {
    const fds = () => readdirSync('/proc/self/fd').length
    await tryCriu(criu)
    const [before, childrenBefore] = [fds(), children()]
    const [result] = await tryCriu(criu, { restores: 2 })
    expect(result!.restoreMs).toBeGreaterThan(0)
    expect(readdirSync(temporary)).toEqual([])
    expect(children()).toEqual(childrenBefore)
    expect(fds()).toBe(before)
  })

  it('leaves none where the dump fails', { timeout: 60_000 }, async () => {
    const childrenBefore = children()
    // criu does not dump one end of a Unix connection whose other end is ours.
    const path = join(temporary, 'socket')
    const server = createServer().listen(path)
    await once(server, 'listening')
    try {
      const command = [process.execPath, '-e', `net.connect(${JSON.stringify(path)}); setInterval(() => {}, 1e6)`]
      const ready = async () => void (await once(server, 'connection'))
      const trial = tryCriu(criu, { command, env: { UV_USE_IO_URING: '0' }, echo: false, ready })
      await expect(trial).rejects.toThrow(/^criu dump: .*unix/i)
    } finally {
      server.close()
    }
    expect(readdirSync(temporary).filter((name) => name !== 'socket')).toEqual([])
    await vi.waitFor(() => expect(children()).toEqual(childrenBefore))
  })

  it('says of a process that ends where it should answer that it ended', { timeout: 60_000 }, async () => {
    // Reads its line, and has nothing to say.
    const command = ['sh', '-c', 'read line; exit 3']
    await expect(tryCriu(criu, { command, ready: () => sleep(300) })).rejects.toThrow('the restored process has ended')
  })
})

describe('warmfork doctor', () => {
  it('prints the report as JSON, and nothing else', { timeout: 60_000 }, async () => {
    const { stdout } = await cli(['--json', '--store', directory])
    const report = JSON.parse(stdout) as DoctorReport
    expect(typeof report.forksWork).toBe('boolean')
    for (const result of report.checks) {
      expect(result.name).not.toBe('')
      expect(['ok', 'warn', 'fail']).toContain(result.status)
      expect(result.found).not.toBe('')
    }
  })

  it('ends with status 1 where forks cannot work, and says so', { timeout: 60_000 }, async () => {
    const env = { WARMFORK_CRIU: join(directory, 'nowhere') }
    const { status, stdout } = await cli(['--store', directory], env)
    expect(status).toBe(1)
    expect(stdout).toContain('✖ criu')
    expect(stdout).toContain('Forks cannot work here (criu)')
    expect((await cli(['--json', '--store', directory], env)).status).toBe(1)
  })

  it('uses no colour where stdout is no terminal', { timeout: 60_000 }, async () => {
    const { stdout } = await cli(['--store', directory], { FORCE_COLOR: '1' })
    expect(stdout).not.toContain('\u001b[')
  })
})

describe('what is found is judged', () => {
  const all = (1n << 41n) - 1n
  const without = (...bits: number[]) => bits.reduce((set, bit) => set & ~(1n << BigInt(bit)), all)

  it('by kernel version', () => {
    expect(judgeKernel('5.4.0-generic').status).toBe('fail')
    expect(judgeKernel('5.8.1').status).toBe('warn')
    expect(judgeKernel('6.1.0-37-amd64')).toMatchObject({
      status: 'ok',
      cost: expect.stringContaining('PROCMAP_QUERY'),
    })
    expect(judgeKernel('6.18.0').cost).toBeUndefined()
  })

  it('by capability', () => {
    expect(judgeCapabilities(0, all)).toMatchObject({ status: 'ok', found: 'root with all that criu needs' })
    expect(judgeCapabilities(0, without(24))).toMatchObject({
      status: 'ok',
      cost: expect.stringContaining('CAP_SYS_RESOURCE'),
    })
    expect(judgeCapabilities(0, without(21, 19))).toMatchObject({
      status: 'fail',
      found: 'root without CAP_SYS_PTRACE, CAP_SYS_ADMIN',
      remedy: expect.stringContaining('--cap-add CAP_SYS_ADMIN'),
    })
    expect(judgeCapabilities(1000, 0n)).toMatchObject({
      status: 'fail',
      remedy: expect.stringContaining('AmbientCapabilities='),
    })
    expect(judgeCapabilities(1000, (1n << 40n) | (1n << 19n) | (1n << 21n) | (1n << 8n)).status).toBe('ok')
  })

  it('by room for ids, files and generations', () => {
    expect(judgePidMax(1024).status).toBe('warn')
    expect(judgePidMax(32768)).toMatchObject({ status: 'ok', cost: expect.stringContaining('32768') })
    expect(judgePidMax(4194304).cost).toBeUndefined()
    expect(judgeOpenFiles('Max open files            1024                 1048576              files').status).toBe(
      'ok',
    )
    expect(judgeOpenFiles('Max open files            1024                 unlimited            files').status).toBe(
      'ok',
    )
    expect(judgeOpenFiles('Max open files            1024                 1024                 files')).toMatchObject({
      status: 'warn',
      cost: 'no more than about 184 children at once',
    })
    expect(judgeSpace(10 * 2 ** 20).status).toBe('fail')
    expect(judgeSpace(500 * 2 ** 20).status).toBe('warn')
    expect(judgeSpace(5 * 2 ** 30).status).toBe('ok')
  })

  it('by how files can be shared', () => {
    expect(judgeCopyMeans({ reflinks: true, hardLinks: false, systemLinks: false }).status).toBe('ok')
    expect(judgeCopyMeans({ reflinks: false, hardLinks: true, systemLinks: true }).cost).toBeUndefined()
    expect(judgeCopyMeans({ reflinks: false, hardLinks: true, systemLinks: false }).cost).toContain('copies')
    expect(judgeCopyMeans({ reflinks: false, hardLinks: false, systemLinks: false }).status).toBe('warn')
  })

  it('by mount, of which the longest that leads to a path counts, and the last of several', () => {
    const mountinfo = [
      '22 1 254:0 / / rw,relatime - ext4 /dev/vda rw',
      '30 22 0:25 / /var\\040lib rw,noexec - tmpfs tmpfs rw',
      '31 22 0:26 / /srv rw shared:1 - xfs /dev/vdb rw',
      '32 31 0:27 / /srv ro shared:2 master:1 - btrfs /dev/vdc rw',
    ].join('\n')
    expect(mountFor('/home', mountinfo)).toMatchObject({ point: '/', type: 'ext4' })
    expect(mountFor('/var lib/x', mountinfo)).toMatchObject({ type: 'tmpfs', options: ['rw', 'noexec'] })
    expect(mountFor('/srv/warmfork', mountinfo)).toMatchObject({ type: 'btrfs', options: ['ro'] })
    expect(mountFor('/srvx', mountinfo)).toMatchObject({ type: 'ext4' })
  })

  it('by the native parts that are there', () => {
    expect(checkShim(directory).status).toBe('warn')
    expect(checkGuard(directory).status).toBe('fail')
    expect(checkInit(directory).status).toBe('warn')
  })
})

describe('a result is printed', () => {
  const plain = pc.createColors(false)

  it('with its cost, and with its remedy where something is to be done', () => {
    const result: CheckResult = {
      name: 'pid_max',
      status: 'ok',
      found: '32768',
      cost: 'ids come round',
      remedy: 'raise it',
    }
    expect(formatResult(result, plain)).toBe('✔ pid_max       32768 – ids come round')
    expect(formatResult({ ...result, status: 'warn' }, plain)).toBe('⚠ pid_max       32768 – ids come round → raise it')
  })

  it('and a verdict names what failed', () => {
    const report = { forksWork: false, checks: [{ name: 'criu', status: 'fail', found: 'none' }] } as const
    expect(formatVerdict(report, plain)).toContain('(criu)')
  })
})
