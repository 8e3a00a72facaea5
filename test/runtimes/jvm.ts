/** JDK 17 and the newest at hand, each with three collectors, and JRuby. */
import { existsSync, readdirSync, readFileSync, realpathSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { cached, debianAvailable, debianInstall, inPath, PROBES, PROJECT, type Runtime, run } from './runtime.js'

const SOURCE = join(PROBES, 'Probe.java')
const JVM_DIRECTORY = '/usr/lib/jvm'

/** The homes of the JDKs (with a compiler) of this machine by their feature version, 17 or 25. */
function jdks(): Map<number, string> {
  const found = new Map<number, string>()
  const own = inPath('javac')
  const homes = existsSync(JVM_DIRECTORY) ? readdirSync(JVM_DIRECTORY).map((name) => join(JVM_DIRECTORY, name)) : []
  if (own) homes.unshift(dirname(dirname(realpathSync(own))))
  for (const home of homes) {
    if (!existsSync(join(home, 'bin/javac')) || !existsSync(join(home, 'release'))) continue
    const version = /^JAVA_VERSION="(\d+)/m.exec(readFileSync(join(home, 'release'), 'utf8'))
    if (version && !found.has(Number(version[1]))) found.set(Number(version[1]), home)
  }
  return found
}

function jdk(which: 17 | 'newest'): string | undefined {
  const found = jdks()
  return found.get(which === 17 ? 17 : Math.max(...found.keys()))
}

const javaVersion = (home: string) =>
  /^JAVA_VERSION="([^"]+)/m.exec(readFileSync(join(home, 'release'), 'utf8'))?.[1] ?? '?'

export function java(which: 17 | 'newest', collector: 'G1' | 'Serial' | 'Parallel'): Runtime {
  return {
    name: `JDK ${which === 17 ? '17' : 'newest'}, ${collector}`,
    available: async () => {
      if (which === 17)
        return jdk(17)
          ? undefined
          : debianAvailable('/usr/lib/jvm/java-17-openjdk-amd64/bin/javac', 'openjdk-17-jdk-headless')
      return Math.max(...jdks().keys()) > 17 ? undefined : 'no JDK newer than 17 is installed'
    },
    install: async (cache) => {
      if (which === 17 && !jdk(17))
        await debianInstall('/usr/lib/jvm/java-17-openjdk-amd64/bin/javac', 'openjdk-17-jdk-headless')
      const home = jdk(which)!
      await cached(cache, 'java-probe', readFileSync(SOURCE, 'utf8'), async (into) => {
        await run(join(home, 'bin/javac'), ['--release', '17', '-d', into, SOURCE])
      })
    },
    command: (cache) => [
      join(jdk(which)!, 'bin/java'),
      `-XX:+Use${collector}GC`,
      '-cp',
      join(cache, 'java-probe'),
      'Probe',
    ],
    version: async () => javaVersion(jdk(which)!),
    memory: 'cow',
  }
}

/** From Maven Central, as `examples/jruby/setup.mjs` brings it. */
export const jruby: Runtime = {
  name: 'JRuby',
  available: async () => {
    if (jrubyProgram() && inPath('java')) return undefined
    if (inPath('mvn') && inPath('java')) return undefined
    return debianAvailable('mvn', 'maven')
  },
  install: async () => {
    await run(process.execPath, [join(PROJECT, 'examples/jruby/setup.mjs')], { timeoutMs: 1_800_000 })
  },
  command: () => [jrubyProgram()!, join(PROBES, 'probe.rb')],
  version: async () => /^jruby (\S+)/.exec(await run(jrubyProgram()!, ['--version']))?.[1] ?? '?',
  memory: 'cow',
}

/** The example and the tests share one copy, in `.cache` of the project. */
function jrubyProgram(): string | undefined {
  const cache = join(PROJECT, '.cache')
  const name = existsSync(cache)
    ? readdirSync(cache).find((entry) => /^jruby-[\d.]+\d$/.test(entry) && existsSync(join(cache, entry, 'bin/jruby')))
    : undefined
  return name && join(cache, name, 'bin/jruby')
}
