/**
 * Gets a criu that suits this kernel into a private prefix, without touching the system: Debian's newer suites have one,
 * and its own loader and libraries come with it. It knows apt and dpkg; which criu is then used is binary.ts's business.
 */
import { execFile } from 'node:child_process'
import {
  accessSync,
  chmodSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { release, tmpdir } from 'node:os'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { WarmforkError } from '../../errors.js'
import { tryLock } from '../../linux/libc.js'
import { allPids } from '../../linux/proc.js'
import { debianMirrors, readAptSources } from './apt-sources.js'
import {
  type Criu,
  defaultPrefix,
  formatVersion,
  isSuitable,
  PRIVATE_MANIFEST,
  type PrivateManifest,
  parseVersion,
  privateVersions,
  readPrivate,
  requiredVersion,
} from './binary.js'

export interface InstallCriuOptions {
  /** The private prefix; the version becomes a directory in it. @default `defaultPrefix()` */
  prefix?: string
  /** @default that of the running kernel (`uname -r`) */
  kernelRelease?: string
  /** Called with a short sentence at each step. */
  onProgress?: (line: string) => void
  /** For the whole installation, in milliseconds; it takes 3 to 10 seconds on a usual line. @default 300_000 */
  timeoutMs?: number
  signal?: AbortSignal
  /** Where apt's configuration is. @default /etc/apt */
  aptEtc?: string
}

/** Suites of Debian in the order in which they are tried: the first whose criu suits the kernel is taken. */
const SUITES = ['testing', 'unstable', 'bookworm-backports', 'trixie']

/** What apt says of a mirror that does not answer at all, other than of a suite that it does not have. */
const UNREACHABLE =
  /Could not connect|Unable to connect|Could not resolve|Temporary failure resolving|connection timed out|Cannot initiate the connection/i

/** What apt says of lists whose `Valid-Until` is past, or whose `Date` is to come. */
const EXPIRED = /is expired \(invalid since|is not valid yet/

const DEBIAN_KEYRINGS = [
  '/usr/share/keyrings/debian-archive-keyring.gpg',
  '/usr/share/keyrings/debian-archive-keyring.pgp',
]

/**
 * Installs a criu that suits the kernel into the private prefix, unless one is there, and returns it. Atomic: a version is
 * there entirely or not at all. Two installations at once take turns, and the second finds the work done.
 * @throws INSTALL_FAILED with apt's output in `output`, TIMEOUT where another installation holds the lock for too long
 */
export async function installCriu(options: InstallCriuOptions = {}): Promise<Criu> {
  const prefix = resolve(options.prefix ?? defaultPrefix())
  const kernelRelease = options.kernelRelease ?? release()
  const installed = () => privateVersions(prefix).find((criu) => isSuitable(criu.version, kernelRelease))
  const before = installed()
  if (before) return before

  const run = new Run(options.timeoutMs ?? 300_000, options.signal)
  const say = options.onProgress ?? (() => {})
  requireApt()
  try {
    mkdirSync(prefix, { recursive: true, mode: 0o755 })
    accessSync(prefix, constants.W_OK)
  } catch (error) {
    throw failure(`write to ${prefix}`, (error as Error).message, {
      cause: error,
      remedy: 'Make it writable, or run as its owner.',
    })
  }
  const unlock = await lock(prefix, run, say)
  try {
    const meanwhile = installed()
    if (meanwhile) return meanwhile
    removeLeftovers(prefix)
    const criu = await install(prefix, kernelRelease, options.aptEtc ?? '/etc/apt', run, say)
    removeUnused(prefix, dirnameOf(criu), say)
    return criu
  } finally {
    unlock()
  }
}

/** The directory of a private version: its loader lies below it, and its name is the version. */
function dirnameOf(criu: Criu): string {
  let directory = criu.argv[0]!
  while (!existsSync(join(directory, PRIVATE_MANIFEST)) && directory !== '/') directory = dirname(directory)
  return directory
}

async function install(
  prefix: string,
  kernelRelease: string,
  aptEtc: string,
  run: Run,
  say: (line: string) => void,
): Promise<Criu> {
  // Beside the target, so that the rename at the end stays on one file system.
  const staging = mkdtempSync(join(prefix, '.new-'))
  const state = mkdtempSync(join(tmpdir(), 'warmfork-apt-'))
  try {
    const apt = await new AptState(state, run).prepare()
    const { suite, version } = await chooseSuite(apt, aptEtc, kernelRelease, run, say)
    say(`downloading criu ${version} and its libraries from Debian ${suite}`)
    await apt.get(['--download-only', '--yes', 'install', 'criu'], 'download criu')
    const archives = join(state, 'cache/archives')
    const packages = readdirSync(archives).filter((name) => name.endsWith('.deb'))
    const bytes = packages.reduce((sum, name) => sum + statSync(join(archives, name)).size, 0)
    say(`unpacking ${packages.length} packages (${(bytes / 1e6).toFixed(1)} MB)`)
    for (const name of packages) await run.command('dpkg', ['-x', join(archives, name), staging], `unpack ${name}`)
    // Documentation and the like, which criu does not read.
    for (const name of ['usr/share', 'etc', 'var']) rmSync(join(staging, name), { recursive: true, force: true })

    const manifest = describe(staging)
    const argv = [
      join(staging, manifest.loader),
      '--library-path',
      manifest.libraryPath.map((path) => join(staging, path)).join(':'),
      join(staging, manifest.criu),
    ]
    // The proof that the pieces fit together, before anybody can find them.
    const said = await run.command(argv[0]!, [...argv.slice(1), '--version'], `start the unpacked criu ${version}`)
    const found = parseVersion(said)
    if (!found || !isSuitable(found, kernelRelease)) throw failure('start the unpacked criu', `it says: ${said.trim()}`)
    writeFileSync(
      join(staging, PRIVATE_MANIFEST),
      `${JSON.stringify({ ...manifest, version: formatVersion(found) }, null, 2)}\n`,
    )
    chmodSync(staging, 0o755)
    // A directory renamed before its files are on the disk could be empty after a power cut.
    await run.command('sync', ['-f', join(staging, PRIVATE_MANIFEST)], 'write criu to the disk')

    const target = join(prefix, formatVersion(found))
    rmSync(target, { recursive: true, force: true })
    renameSync(staging, target)
    const criu = readPrivate(target)
    if (!criu) throw failure(`read ${target}`, 'it is not complete after it was installed')
    say(`installed criu ${formatVersion(found)} in ${target}`)
    return criu
  } finally {
    rmSync(staging, { recursive: true, force: true })
    rmSync(state, { recursive: true, force: true })
  }
}

/** Finds loader, libraries and criu in an unpacked tree; they lie in /usr or, in older suites, beside it. */
function describe(root: string): Omit<PrivateManifest, 'version'> {
  const loaders: string[] = []
  const libraryPath: string[] = []
  for (const directory of ['usr/lib', 'lib', 'usr/lib64', 'lib64']) {
    const path = join(root, directory)
    if (!existsSync(path)) continue
    for (const entry of readdirSync(path, { withFileTypes: true })) {
      const isMultiarch = entry.isDirectory() && /^[a-z0-9_]+-linux-gnu/.test(entry.name)
      if (isMultiarch) libraryPath.push(join(directory, entry.name))
      const names = isMultiarch
        ? readdirSync(join(path, entry.name)).map((name) => join(entry.name, name))
        : [entry.name]
      for (const name of names) {
        if (/^ld-linux[-\w]*\.so\.\d+$/.test(basename(name))) loaders.push(join(path, name))
      }
    }
  }
  // A link may be absolute, into the system's own libraries: only one whose file lies in the tree will do.
  const loader = loaders.find((path) => existsSync(path) && statSync(path).isFile())
  const criu = ['usr/sbin/criu', 'sbin/criu', 'usr/bin/criu'].find((path) => existsSync(join(root, path)))
  if (!loader || !criu || libraryPath.length === 0)
    throw failure('use the unpacked criu', 'the packages are not laid out as expected')
  return { loader: relative(root, loader), libraryPath, criu }
}

/** Points apt's private state at the first mirror and suite whose criu suits the kernel. */
async function chooseSuite(
  apt: AptState,
  aptEtc: string,
  kernelRelease: string,
  run: Run,
  say: (line: string) => void,
): Promise<{ suite: string; version: string }> {
  const keyrings = DEBIAN_KEYRINGS.filter((path) => existsSync(path))
  const mirrors = debianMirrors(readAptSources(aptEtc)).map(({ uri, signedBy }) => ({
    uri,
    keyring: signedBy.join(',') || keyrings[0],
  }))
  if (mirrors.length === 0) {
    throw failure("find Debian's archive", 'apt is not configured with a mirror of Debian', {
      remedy: installHint(readOsRelease()),
    })
  }
  const tried: string[] = []
  let last: unknown
  for (const { uri, keyring } of mirrors) {
    for (const suite of SUITES) {
      say(`looking for criu in Debian ${suite}`)
      try {
        await apt.update(uri, suite, keyring, () => {
          say(`the lists of Debian ${suite} are out of date (or the clock is wrong); their signature holds`)
        })
      } catch (error) {
        run.throwIfOver()
        last = error
        tried.push(`${suite}: not to be had`)
        // Its other suites would only take as long.
        if (UNREACHABLE.test((error as WarmforkError).output ?? '')) break
        continue
      }
      const policy = await apt.cache(['policy', 'criu'], 'ask apt for the version of criu')
      const candidate = /Candidate:\s*(\S+)/.exec(policy)?.[1] ?? '(none)'
      const version = parseVersion(candidate)
      if (version && isSuitable(version, kernelRelease)) return { suite, version: formatVersion(version) }
      tried.push(`${suite}: ${candidate}`)
    }
  }
  const output = (last as WarmforkError | undefined)?.output
  throw failure(
    `find criu ${formatVersion(requiredVersion(kernelRelease))} or newer for kernel ${kernelRelease}`,
    `none of the suites has it (${tried.join('; ')})${output ? `; apt says: ${lastLine(output)}` : ''}`,
    {
      cause: last,
      ...(output ? { output } : {}),
      remedy: "Check the network, apt's proxy and its sources, then run `warmfork doctor --install` again.",
    },
  )
}

/**
 * An apt with lists, cache and a (empty) list of installed packages of its own, so that it sees the system as having nothing
 * and brings all libraries; of the system's configuration it keeps how to download (proxies, certificates), not the hooks.
 */
class AptState {
  readonly #directory: string
  readonly #run: Run
  readonly #options: string[]

  constructor(directory: string, run: Run) {
    this.#directory = directory
    this.#run = run
    this.#options = ['-q', '-o', `Dir::Etc::sourcelist=${join(directory, 'sources.list')}`]
  }

  async prepare(): Promise<this> {
    const at = (path: string) => join(this.#directory, path)
    for (const path of ['lists/partial', 'cache/archives/partial', 'none']) mkdirSync(at(path), { recursive: true })
    writeFileSync(at('status'), '')
    // As root, apt downloads as the user _apt, which must be able to reach these files.
    chmodSync(this.#directory, 0o755)
    const architecture = (
      await this.#run.command('dpkg', ['--print-architecture'], 'ask dpkg for the architecture')
    ).trim()
    const dump = await this.#run.command('apt-config', ['dump'], "read apt's configuration")
    const kept = dump
      .split('\n')
      .filter((line) => /^(Acquire|APT::Sandbox)\b/.test(line) && !/^Acquire::(IndexTargets|Languages)\b/.test(line))
    writeFileSync(
      at('apt.conf'),
      [
        ...kept,
        'Dir::Etc::main "/dev/null";',
        'Dir::Etc::parts "/dev/null";',
        'Dir::Etc::sourceparts "/dev/null";',
        'Dir::Etc::preferences "/dev/null";',
        'Dir::Etc::preferencesparts "/dev/null";',
        `Dir::State "${this.#directory}";`,
        `Dir::State::lists "${at('lists')}";`,
        `Dir::State::status "${at('status')}";`,
        `Dir::Cache "${at('cache')}";`,
        `APT::Architecture "${architecture}";`,
        `APT::Architectures { "${architecture}"; };`,
        'APT::Install-Recommends "false";',
        'APT::Get::List-Cleanup "true";',
        // Indices of other packages than criu's are not read; translations would be half of the download.
        'Acquire::Languages "none";',
        'Acquire::Retries "2";',
        'Acquire::http::Timeout "20";',
        'Acquire::https::Timeout "20";',
        ...(reachableByAll(this.#directory) ? [] : ['APT::Sandbox::User "root";']),
        '',
      ].join('\n'),
    )
    return this
  }

  /**
   * Replaces the lists by those of one suite; apt checks their signatures. Of a mirror that stands still, or where the clock
   * is wrong, apt refuses lists whose time is over: they are taken all the same, and `expired` is called. The signature
   * holds; what the time protects from is to be kept from newer versions, and here any suitable one is new.
   */
  async update(uri: string, suite: string, keyring: string | undefined, expired: () => void): Promise<void> {
    const signedBy = keyring ? `[signed-by=${keyring}] ` : ''
    writeFileSync(join(this.#directory, 'sources.list'), `deb ${signedBy}${uri} ${suite} main\n`)
    // Without Error-Mode, apt-get answers a mirror that cannot be reached with a warning and status 0.
    const args = ['-o', 'APT::Update::Error-Mode=any', 'update']
    const tried = `read the packages of Debian ${suite}`
    try {
      await this.get(args, tried)
    } catch (error) {
      if (!EXPIRED.test((error as WarmforkError).output ?? '')) throw error
      expired()
      await this.get(['-o', 'Acquire::Check-Valid-Until=false', '-o', 'Acquire::Check-Date=false', ...args], tried)
    }
  }

  get(args: readonly string[], tried: string): Promise<string> {
    return this.#command('apt-get', args, tried)
  }

  cache(args: readonly string[], tried: string): Promise<string> {
    return this.#command('apt-cache', args, tried)
  }

  #command(program: string, args: readonly string[], tried: string): Promise<string> {
    const env = { APT_CONFIG: join(this.#directory, 'apt.conf'), DEBIAN_FRONTEND: 'noninteractive' }
    return this.#run.command(program, [...this.#options, ...args], tried, env)
  }
}

/** Whether every directory above may be entered by any user. */
function reachableByAll(directory: string): boolean {
  for (let path = directory; ; path = dirname(path)) {
    if ((statSync(path).mode & 0o001) === 0) return false
    if (path === '/') return true
  }
}

/** Runs commands under one deadline and keeps what they said for the error. */
class Run {
  readonly #deadline: number
  readonly #timeoutMs: number
  readonly #signal: AbortSignal | undefined

  constructor(timeoutMs: number, signal: AbortSignal | undefined) {
    this.#timeoutMs = timeoutMs
    this.#deadline = Date.now() + timeoutMs
    this.#signal = signal
  }

  throwIfOver(): void {
    this.#signal?.throwIfAborted()
    if (Date.now() >= this.#deadline) {
      throw failure('install criu', `it took longer than ${this.#timeoutMs} ms`, {
        remedy: 'Check the network, then raise the time-out.',
      })
    }
  }

  command(program: string, args: readonly string[], tried: string, env: NodeJS.ProcessEnv = {}): Promise<string> {
    this.throwIfOver()
    return new Promise((done, failed) => {
      const options = {
        timeout: Math.max(1, this.#deadline - Date.now()),
        killSignal: 'SIGKILL' as const,
        maxBuffer: 16 * 1024 * 1024,
        env: { ...process.env, LC_ALL: 'C.UTF-8', ...env },
        ...(this.#signal ? { signal: this.#signal } : {}),
      }
      execFile(program, args, options, (error, stdout, stderr) => {
        if (!error) return done(stdout)
        const output = `${stdout}${stderr}`.slice(-64 * 1024)
        const over = Date.now() >= this.#deadline ? `no answer within ${this.#timeoutMs} ms` : undefined
        const happened = over ?? `${program} says: ${lastLine(output) || error.message}`
        failed(failure(tried, happened, { cause: error, output }))
      })
    })
  }
}

/** Takes the prefix's lock, waiting for another installation to end; the kernel gives it back if we are killed. */
async function lock(prefix: string, run: Run, say: (line: string) => void): Promise<() => void> {
  const fd = openSync(join(prefix, '.lock'), constants.O_RDWR | constants.O_CREAT, 0o644)
  try {
    for (let waited = false; !tryLock(fd); waited = true) {
      if (!waited) say('waiting for another installation')
      run.throwIfOver()
      await sleep(100)
    }
  } catch (error) {
    closeSync(fd)
    throw error
  }
  return () => closeSync(fd)
}

/** What an installation that was killed has left. Called with the lock held. */
function removeLeftovers(prefix: string): void {
  for (const name of readdirSync(prefix)) {
    if (name.startsWith('.new-')) rmSync(join(prefix, name), { recursive: true, force: true })
  }
}

/** Removes older versions, but for those that a process still runs. A version is replaced only where it does not suit the kernel any more. */
function removeUnused(prefix: string, keep: string, say: (line: string) => void): void {
  const running = new Set(allPids().map(executableOf))
  for (const criu of privateVersions(prefix)) {
    const directory = dirnameOf(criu)
    if (directory === keep || dirname(directory) !== prefix) continue
    if ([...running].some((path) => path?.startsWith(`${directory}/`))) {
      say(`keeping ${directory}, which is in use`)
      continue
    }
    rmSync(directory, { recursive: true, force: true })
    say(`removed ${directory}`)
  }
}

function executableOf(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/exe`)
  } catch {
    return undefined
  }
}

function requireApt(): void {
  const missing = ['apt-get', 'apt-config', 'dpkg'].filter((name) => !inPath(name))
  if (missing.length === 0) return
  throw failure('install criu', `there is no ${missing.join(' nor ')}`, { remedy: installHint(readOsRelease()) })
}

function inPath(name: string): boolean {
  return (process.env.PATH ?? '').split(':').some((directory) => directory !== '' && existsSync(join(directory, name)))
}

function readOsRelease(): string {
  try {
    return readFileSync('/etc/os-release', 'utf8')
  } catch {
    return ''
  }
}

/** How other distributions bring criu, from the text of /etc/os-release. */
export function installHint(osRelease: string): string {
  const ids = [...osRelease.matchAll(/^ID(?:_LIKE)?="?([^"\n]*)"?$/gm)].flatMap((found) => found[1]!.split(' '))
  const is = (...names: string[]) => names.some((name) => ids.includes(name))
  const needed = 'criu 4.2 or newer (4.1 below Linux 6.16)'
  if (is('ubuntu'))
    return `Install ${needed} from the criu project's PPA (\`add-apt-repository ppa:criu/ppa\`), or name one in WARMFORK_CRIU.`
  if (is('fedora', 'rhel', 'centos'))
    return `Install ${needed} with \`dnf install criu\`, or name one in WARMFORK_CRIU.`
  if (is('alpine')) return `Install ${needed} with \`apk add criu\`, or name one in WARMFORK_CRIU.`
  if (is('arch')) return `Install ${needed} with \`pacman -S criu\`, or name one in WARMFORK_CRIU.`
  if (is('suse', 'opensuse')) return `Install ${needed} with \`zypper install criu\`, or name one in WARMFORK_CRIU.`
  return `Install ${needed} by your distribution's means, or name one in WARMFORK_CRIU.`
}

function lastLine(text: string): string {
  const lines = text
    .split('\n')
    .map((line) => line.trim())
    .filter(Boolean)
  return lines.findLast((line) => /^E:/.test(line)) ?? lines.at(-1) ?? ''
}

function failure(
  tried: string,
  happened: string,
  more: { cause?: unknown; output?: string; remedy?: string } = {},
): WarmforkError {
  return new WarmforkError('INSTALL_FAILED', { tried, happened: happened.replace(/\.$/, ''), ...more })
}
