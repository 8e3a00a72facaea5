/** `npm run -s bench -- NAME …`: one bench a file; each prints one JSON object, or a table without `--json`. */
const benches: Readonly<Record<string, () => Promise<(args: readonly string[]) => Promise<void>>>> = {
  fork: async () => (await import('./fork.js')).benchFork,
  refork: async () => (await import('./refork.js')).benchRefork,
  warmth: async () => (await import('./warmth.js')).benchWarmth,
  'worker-fork': async () => (await import('./worker-fork.js')).benchWorkerFork,
}

const [name = '', ...args] = process.argv.slice(2)
const bench = benches[name]
if (!bench) {
  console.error(`usage: npm run -s bench -- ${Object.keys(benches).join('|')} [options]`)
  process.exit(2)
}
await (await bench())(args)
