/**
 * Carries out the Dockerfile's steps without Docker, and tries what comes of it as a container would be: Debian from
 * debootstrap in place of the base image, with the running Node; each RUN in namespaces of its own; at last the entry point as
 * PID 1, as the image's user, with the capabilities that Docker gives. Run by hand, as root; it takes some minutes:
 *
 *     npx tsx test/dockerfile-steps.ts [--keep]
 *
 * All mounts are made in mount namespaces of the processes that need them, so that nothing is mounted afterwards even where
 * this is killed. --keep leaves the directory.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { type Instruction, parseDockerfile, stagesOf } from './dockerfile-parse.js'

const SUITE = 'bookworm'
const STEP_TIMEOUT_MS = 900_000
const repository = dirname(dirname(fileURLToPath(import.meta.url)))

/** What `docker run` leaves to a container, and what the Dockerfile asks for. */
const DOCKER_CAPABILITIES =
  'chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod audit_write setfcap'.split(
    ' ',
  )
const ADDED_CAPABILITIES = ['checkpoint_restore', 'sys_ptrace', 'sys_admin']

if (process.getuid?.() !== 0) {
  console.error('dockerfile-steps: run this as root: it makes namespaces and a chroot')
  process.exit(1)
}

const work = mkdtempSync(join(tmpdir(), 'warmfork-dockerfile-'))
let failures = 0
process.once('exit', () => {
  if (process.argv.includes('--keep')) console.log(`kept ${work}`)
  else rmSync(work, { recursive: true, force: true })
})
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, () => process.exit(1))

function check(what: string, good: boolean, detail = '') {
  console.log(`${good ? '✔' : '✖'} ${what}${detail ? ` (${detail})` : ''}`)
  if (!good) failures += 1
}

/** The mirror that apt on this machine uses for the suite's main archive. */
function mirror() {
  const targets = execFileSync(
    'apt-get',
    ['indextargets', '--format', '$(REPO_URI) $(CODENAME) $(COMPONENT)', 'Created-By: Packages'],
    { encoding: 'utf8', timeout: 30_000 },
  )
  const found = targets.split('\n').map((line) => line.split(' '))
  const main = found.find(
    ([uri, codename, component]) => codename === SUITE && component === 'main' && !/security/.test(uri ?? ''),
  )
  if (!main) throw new Error(`apt of this machine has no mirror of ${SUITE}`)
  return main[0]!
}

function makeBase() {
  if (spawnSync('debootstrap', ['--version']).error) {
    execFileSync('apt-get', ['install', '--yes', '--no-install-recommends', 'debootstrap'], {
      stdio: 'inherit',
      timeout: STEP_TIMEOUT_MS,
    })
  }
  const base = join(work, 'base')
  execFileSync('debootstrap', ['--variant=minbase', SUITE, base, mirror()], { timeout: STEP_TIMEOUT_MS, stdio: 'pipe' })
  // What the base image has on top of Debian: Node and npm below /usr/local.
  copyFileSync(process.execPath, join(base, 'usr/local/bin/node'))
  const npm = realpathSync(execFileSync('npm', ['root', '--global'], { encoding: 'utf8' }).trim())
  const modules = [npm, '/usr/lib/node_modules'].find((path) => existsSync(join(path, 'npm/bin/npm-cli.js')))
  if (!modules) throw new Error('npm is not where Node has its global modules')
  cpSync(join(modules, 'npm'), join(base, 'usr/local/lib/node_modules/npm'), {
    recursive: true,
    verbatimSymlinks: true,
  })
  for (const name of ['npm', 'npx'])
    symlinkSync(`../lib/node_modules/npm/bin/${name}-cli.js`, join(base, 'usr/local/bin', name))
  copyFileSync('/etc/resolv.conf', join(base, 'etc/resolv.conf'))
  return base
}

/** The network of this machine, for the time of the build only: its npm registry, proxies and certificates. */
function networkEnvironment(root: string) {
  const env: Record<string, string> = {}
  for (const [key, value] of Object.entries(process.env))
    if (/^(https?|no|all)_proxy$/i.test(key) && value) env[key] = value
  env.npm_config_registry = execFileSync('npm', ['config', 'get', 'registry'], { encoding: 'utf8' }).trim()
  const bundle = '/etc/ssl/certs/ca-certificates.crt'
  if (existsSync(bundle)) {
    if (!existsSync(join(root, bundle))) {
      mkdirSync(join(root, dirname(bundle)), { recursive: true })
      copyFileSync(bundle, join(root, bundle))
    }
    env.NODE_EXTRA_CA_CERTS = bundle
    env.npm_config_cafile = bundle
  }
  return env
}

/**
 * A process in pid, mount, IPC and UTS namespaces of its own, whose root is the given one (by pivot_root, as in a container:
 * criu wants the root of a process to be that of its mounts). The program becomes PID 1.
 */
function inContainer(
  root: string,
  command: string[],
  options: { env: Record<string, string>; cwd: string; user?: string; capabilities?: readonly string[] },
) {
  const { env, cwd, user, capabilities } = options
  const as =
    user === undefined ? [] : ['setpriv', `--reuid=${user}`, `--regid=${user}`, '--init-groups', '--inh-caps=-all']
  if (capabilities) as.push(`--bounding-set=-all,${capabilities.map((name) => `+${name}`).join(',')}`)
  if (as.length > 0) as.push('--')
  const enter = `
    set -e
    mount --bind "$1" "$1"
    mount -t proc proc "$1/proc"
    mount -t sysfs -o ro sysfs "$1/sys"
    mount --rbind /dev "$1/dev"
    mount -t tmpfs -o nosuid,nodev,noexec shm "$1/dev/shm"
    cd "$1"
    mkdir -p .old
    pivot_root . .old
    umount -l .old
    rmdir .old
    cd "$2"
    shift 2
    exec "$@"`
  const variables = Object.entries(env).map(([key, value]) => `${key}=${value}`)
  return {
    file: 'unshare',
    args: [
      ...['--mount', '--pid', '--ipc', '--uts', '--fork', '--kill-child', '--', 'sh', '-c', enter, 'enter', root, cwd],
      ...as,
      'env',
      '-i',
      ...variables,
      ...command,
    ],
  }
}

const PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

/** Carries out one stage; gives its root directory and the configuration of the image. */
function build(stage: readonly Instruction[], base: string, named: Map<string, string>, index: number) {
  const from = stage[0]
  if (!from || !/^node:20-bookworm-slim$/.test(from.args[0] ?? '')) throw new Error('the base image is another one')
  const root = join(work, `stage-${index}`)
  execFileSync('cp', ['--archive', '--reflink=auto', base, root], { timeout: STEP_TIMEOUT_MS })
  if (from.args[1]?.toUpperCase() === 'AS' && from.args[2]) named.set(from.args[2], root)
  const image = {
    root,
    env: { PATH } as Record<string, string>,
    cwd: '/',
    user: 'root',
    entrypoint: [] as string[],
    command: [] as string[],
  }
  const network = networkEnvironment(root)
  for (const { name, args, flags, text, line } of stage.slice(1)) {
    console.log(`  line ${line}: ${name} ${text.replace(/\s+/g, ' ').slice(0, 90)}`)
    if (name === 'RUN') {
      const { file, args: argv } = inContainer(root, ['/bin/sh', '-c', text], {
        env: { ...image.env, ...network, HOME: '/root', DEBIAN_FRONTEND: 'noninteractive' },
        cwd: image.cwd,
      })
      const done = spawnSync(file, argv, {
        encoding: 'utf8',
        timeout: STEP_TIMEOUT_MS,
        killSignal: 'SIGKILL',
        maxBuffer: 1 << 28,
      })
      if (done.status !== 0)
        throw new Error(
          `line ${line} ended with ${done.status ?? done.signal}:\n${`${done.stdout}${done.stderr}`.slice(-4000)}`,
        )
    } else if (name === 'COPY') {
      const source = flags.from === undefined ? repository : (named.get(flags.from) as string)
      const paths = args.slice(0, -1)
      const target = args.at(-1) as string
      const to = join(root, resolve(image.cwd, target))
      const many = paths.length > 1 || target.endsWith('/')
      for (const path of paths)
        copy(join(source, path), many ? join(to, path.endsWith('/') ? '.' : (path.split('/').at(-1) ?? '')) : to)
      if (flags.chmod) execFileSync('chmod', ['-R', flags.chmod, to])
    } else if (name === 'WORKDIR') {
      image.cwd = resolve(image.cwd, args[0] ?? '/')
      mkdirSync(join(root, image.cwd), { recursive: true })
    } else if (name === 'ENV') {
      for (const pair of args) image.env[pair.slice(0, pair.indexOf('='))] = pair.slice(pair.indexOf('=') + 1)
    } else if (name === 'USER') image.user = args[0] ?? ''
    else if (name === 'ENTRYPOINT') image.entrypoint = [...args]
    else if (name === 'CMD') image.command = [...args]
    else if (name !== 'VOLUME') throw new Error(`line ${line}: this script cannot do ${name}`)
  }
  return image
}

/** As Docker does: of a directory, what is in it. Owners become root. */
function copy(from: string, to: string) {
  cpSync(from, to, { recursive: true, verbatimSymlinks: true })
  execFileSync('chown', ['-R', '0:0', to])
}

/** The processes below one, as the host sees them. */
function below(pid: number) {
  const all: { pid: number; ppid: number; state: string; comm: string }[] = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        const text = readFileSync(`/proc/${name}/stat`, 'latin1')
        const end = text.lastIndexOf(')')
        const [state, ppid] = text.slice(end + 2).split(' ')
        return [
          { pid: Number(name), ppid: Number(ppid), state: state ?? '', comm: text.slice(text.indexOf('(') + 1, end) },
        ]
      } catch {
        return []
      }
    })
  const found = [pid]
  for (const root of found) found.push(...all.filter(({ ppid }) => ppid === root).map((one) => one.pid))
  return all.filter((one) => found.includes(one.pid) && one.pid !== pid)
}

function capabilitiesOf(pid: number) {
  return BigInt(`0x${/^CapPrm:\s*(\S+)/m.exec(readFileSync(`/proc/${pid}/status`, 'latin1'))?.[1] ?? '0'}`)
}

type Image = ReturnType<typeof build>

function runOnce(image: Image, command: string[], capabilities: string[]) {
  const { file, args } = inContainer(image.root, [...image.entrypoint, ...command], {
    env: { ...image.env, HOME: image.cwd },
    cwd: image.cwd,
    user: image.user,
    capabilities,
  })
  return spawnSync(file, args, { encoding: 'utf8', timeout: 120_000, killSignal: 'SIGKILL' })
}

/** Starts the image with a command and gives what `docker exec` would: a way to run another one in it. */
async function start(image: Image, command: string[]) {
  const { file, args } = inContainer(image.root, [...image.entrypoint, ...command], {
    env: { ...image.env, HOME: image.cwd },
    cwd: image.cwd,
    user: image.user,
    capabilities: [...DOCKER_CAPABILITIES, ...ADDED_CAPABILITIES],
  })
  const outer = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  for (const stream of [outer.stdout, outer.stderr]) stream.on('data', (chunk) => (output += chunk))
  const exited = new Promise((done) => outer.once('close', (code, signal) => done(signal ?? code)))
  const outerPid = outer.pid as number
  const first = () => below(outerPid).find(({ ppid }) => ppid === outerPid)
  for (let i = 0; i < 100 && first()?.comm !== 'tini'; i++) await sleep(50)
  return {
    exited,
    output: () => output,
    pid1: first(),
    processes: () => below(outerPid),
    exec: (argv: string[], input = '') =>
      spawnSync(
        'nsenter',
        [
          ...[`--target=${first()?.pid}`, '--mount', '--pid', '--ipc', '--uts', '--root', '--wdns=/', '--'],
          ...[
            'setpriv',
            `--reuid=${image.user}`,
            `--regid=${image.user}`,
            '--init-groups',
            '--inh-caps=-all',
            '--bounding-set=-all',
          ],
          ...['env', '-i', ...Object.entries(image.env).map(([key, value]) => `${key}=${value}`), ...argv],
        ],
        { encoding: 'utf8', input, timeout: 60_000, killSignal: 'SIGKILL' },
      ),
    kill: () => outer.kill('SIGKILL'),
  }
}

async function tryImage(image: Image) {
  const capabilities = [...DOCKER_CAPABILITIES, ...ADDED_CAPABILITIES]
  const doctor = runOnce(image, ['doctor', '--json'], capabilities)
  let report: { forksWork: boolean; checks: { name: string; status: string; found: string }[] } = {
    forksWork: false,
    checks: [],
  }
  try {
    report = JSON.parse(doctor.stdout)
  } catch {
    check('the doctor answers with JSON', false, `${doctor.stdout}${doctor.stderr}`.slice(-1000))
  }
  for (const { name, status, found } of report.checks) console.log(`    ${status.padEnd(4)} ${name}: ${found}`)
  check('forks work for the image’s user with the capabilities', report.forksWork && doctor.status === 0)
  check(
    'the user is not root',
    report.checks.some(({ name, found }) => name === 'capabilities' && /^user \d+/.test(found)),
  )

  const without = runOnce(image, ['doctor'], DOCKER_CAPABILITIES)
  check('without the capabilities the doctor fails', without.status === 1, `status ${without.status}`)
  check('and the entry point says which are missing', /--cap-add SYS_ADMIN/.test(without.stderr))

  const program = `console.log('ready'); process.stdin.on('data', (text) => { console.log('got ' + text); process.exit(7) })`
  const container = await start(image, [
    'run',
    '--name',
    'trial',
    '--engine',
    'criu',
    '--ready-output',
    'ready',
    '--',
    'node',
    '-e',
    program,
  ])
  try {
    check('PID 1 is tini', container.pid1?.comm === 'tini', container.pid1?.comm)
    for (let i = 0; i < 300 && !/ready: trial/.test(container.output()) && container.processes().length > 0; i++)
      await sleep(100)
    check(
      'a supervisor starts',
      /ready: trial/.test(container.output()),
      container.output().trim().split('\n').slice(-3).join(' | '),
    )
    check('and its memory is shared', /memory is shared/.test(container.output()))
    // Pipes and files: spawnSync's own are sockets, which a child cannot have as its streams.
    const fork =
      'echo hello | warmfork fork --name trial > /tmp/answer 2> /tmp/said; echo $? >> /tmp/answer; cat /tmp/answer; cat /tmp/said >&2'
    const forked = container.exec(['sh', '-c', fork])
    check('a child answers, and its status is passed on', forked.stdout === 'got hello\n\n7\n', forked.stderr.trim())
    const privileged = container
      .processes()
      .filter(({ pid, comm }) => comm === 'node' && capabilitiesOf(pid) !== 0n)
      .map(({ pid }) => readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0').slice(0, 2).join(' '))
    check('only the supervisor has capabilities', privileged.length === 1, privileged.join('; '))
    for (let i = 0; i < 20; i++) container.exec(['sh', '-c', 'sleep 0.1 & sleep 0.1 & exit 0'])
    await sleep(500)
    const zombies = container.processes().filter(({ state }) => state === 'Z')
    check(
      'PID 1 reaps 40 orphans',
      zombies.length === 0,
      zombies.map(({ comm, ppid }) => `${comm} below ${ppid}`).join(', '),
    )
    process.kill(container.pid1!.pid, 'SIGTERM')
    const ended = await Promise.race([container.exited, sleep(15_000).then(() => 'nothing within 15 s')])
    check('SIGTERM to PID 1 ends it all', ended === 0 || ended === 143, `exit ${ended}`)
  } finally {
    container.kill()
    await container.exited
  }
}

try {
  console.log('base: debootstrap, Node and npm of this machine')
  const base = makeBase()
  const stages = stagesOf(parseDockerfile(readFileSync(join(repository, 'Dockerfile'), 'utf8')))
  const named = new Map()
  let image: Image | undefined
  for (const [index, stage] of stages.entries()) {
    console.log(`stage ${index + 1} of ${stages.length}`)
    image = build(stage, base, named, index)
  }
  if (image) await tryImage(image)
} catch (error) {
  console.error(`✖ ${error instanceof Error ? error.message : error}`)
  failures += 1
}
console.log(failures === 0 ? 'all is well' : `${failures} failed`)
process.exitCode = failures === 0 ? 0 : 1
