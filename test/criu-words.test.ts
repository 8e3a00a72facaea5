import { describe, expect, it } from 'vitest'
import { dumpArguments, restoreRequest } from '../src/engines/criu/args.js'
import { isIdCollision, isOutOfProcesses, meaningfulLines, summarize } from '../src/engines/criu/log.js'
import { RestoreRequest } from '../src/engines/criu/rpc.js'
import { decode } from '../src/image/message.js'
import { IdAllocator } from '../src/linux/ids.js'
import { idInUse } from '../src/linux/libc.js'

describe('what criu is told', () => {
  const dump = {
    pid: 42,
    directory: '/images',
    logFile: 'dump.log',
    unprivileged: false,
    timeoutMs: 2500,
    external: [],
  }

  it('leaves the source running, with its connections, and waits for it in whole seconds', () => {
    const args = dumpArguments(dump)
    expect(args.slice(0, 5)).toEqual(['dump', '--tree', '42', '--images-dir', '/images'])
    expect(args).toContain('--leave-running')
    expect(args).toContain('--tcp-close')
    expect(args).toContain('--skip-in-flight')
    expect(args[args.indexOf('--timeout') + 1]).toBe('3')
    expect(args).not.toContain('--unprivileged')
  })

  it('says where rights are missing', () => {
    expect(dumpArguments({ ...dump, unprivileged: true })).toContain('--unprivileged')
  })

  it('asks for a stopped child of ours with the descriptors by their keys', () => {
    const inherited = [
      { key: 'pipe:[7]', fd: 4 },
      { key: 'warmfork/listener/3', fd: 5 },
    ]
    const request = restoreRequest({ directory: '/d', logFile: 'l', logLevel: 1, inherited, unprivileged: false })
    const { type, options } = decode(RestoreRequest, request)
    expect(type).toBe(2)
    expect(options).toMatchObject({
      imagesDirectory: '/d',
      imagesDirectoryFd: -1,
      restoreSibling: true,
      leaveStopped: true,
      tcpClose: true,
      inheritFd: inherited,
    })
    expect(options).not.toHaveProperty('unprivileged')
  })
})

describe("criu's log", () => {
  it('is reduced to its errors, once each, without stamps and places', () => {
    const log = [
      '(00.001) Warn  (criu/kerndat.c:1): a warning',
      "(00.002) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted",
      '(00.003) Error (criu/files.c:9): the reason',
      '(00.004)     77: Error (criu/files.c:9): the reason',
      '(00.005) some other line',
    ].join('\n')
    expect(meaningfulLines(log)).toEqual(['the reason'])
    expect(summarize(log, 'nothing')).toBe('criu says: the reason')
  })

  it('falls back to warnings, and to the words of the caller', () => {
    expect(meaningfulLines('(00.001) Warn  (criu/x.c:1): a warning')).toEqual(['a warning'])
    expect(summarize('', 'criu ended with status 1')).toBe('criu ended with status 1')
  })

  it('tells a taken id from other failures', () => {
    expect(isIdCollision("Error (criu/cr-restore.c:1230): Can't fork for 4242: File exists")).toBe(true)
    expect(isIdCollision('pie: 7: Error (criu/pie/restorer.c:2185): Unable to create a thread: -17')).toBe(true)
    expect(isIdCollision('Error (criu/files-reg.c:1): mkdir failed: File exists')).toBe(false)
    expect(isOutOfProcesses('Error: Unable to create a thread: -11')).toBe(true)
    expect(isOutOfProcesses('Error: Unable to create a thread: -17')).toBe(false)
  })
})

describe('ids for forks', () => {
  it('are free, different, and downwards', () => {
    const ids = new IdAllocator()
    const taken = ids.take(50)
    expect(new Set(taken).size).toBe(50)
    expect(taken.filter(idInUse)).toEqual([])
    const rises = taken.filter((id, index) => index > 0 && id > taken[index - 1]!)
    // At most one: where the lowest id is reached, it goes on from the highest.
    expect(rises.length).toBeLessThanOrEqual(1)
  })

  it('come back only after all others', () => {
    const ids = new IdAllocator()
    const first = ids.take(200)
    ids.release(first)
    const later = new Set(Array.from({ length: 20 }, () => ids.take(100)).flat())
    expect(first.filter((id) => later.has(id))).toEqual([])
  })

  it('are not given twice while they are reserved', () => {
    const ids = new IdAllocator()
    const all = new Set<number>()
    for (let i = 0; i < 30; i++) for (const id of ids.take(100)) all.add(id)
    expect(all.size).toBe(3000)
  })

  it('run out with a code', () => {
    const ids = new IdAllocator()
    expect(() => ids.take(5_000_000)).toThrow(expect.objectContaining({ code: 'PIDS_EXHAUSTED' }))
  })
})
