/**
 * What a fork costs, beside a cold start, a stock restore and fork(2), all in one run.
 *
 *     npm run -s bench -- fork --rss 500 [--template node|jruby] [--node BINARY] [--rounds 10] [--json]
 *
 * `--rss` in MiB; JRuby has its natural size. `forksPerSecond` is measured with 200 forks at each of four concurrencies.
 */
import { parseArgs } from 'node:util'
import { figuresTable } from '../src/cli/figures-table.js'
import { measureFigures, nodeProgram, type Program } from '../src/demo/figures.js'

export async function benchFork(args: readonly string[]): Promise<void> {
  const { values } = parseArgs({
    args: [...args],
    options: {
      rss: { type: 'string', default: '100' },
      template: { type: 'string', default: 'node' },
      node: { type: 'string', default: process.execPath },
      rounds: { type: 'string', default: '11' },
      cold: { type: 'string' },
      forks: { type: 'string', default: '200' },
      json: { type: 'boolean', default: false },
    },
  })
  const program = values.template === 'jruby' ? await jrubyProgram() : nodeProgram(Number(values.rss), values.node)
  const figures = await measureFigures({
    program,
    rounds: Number(values.rounds),
    coldRounds: Number(values.cold ?? values.rounds),
    throughputForks: Number(values.forks),
    onStep: (step) => process.stderr.write(`${step}\n`),
  })
  process.stdout.write(values.json ? `${JSON.stringify(figures)}\n` : `${figuresTable(figures)}\n`)
}

/** The mail's hello: what ends a cold start is `jruby -e "puts 'hello'"`; a fork says hello for each line that it reads. */
async function jrubyProgram(): Promise<Program> {
  const setup = new URL('../examples/jruby/setup.mjs', import.meta.url).href
  const { jruby } = (await import(setup)) as { jruby: () => string }
  const script = "STDOUT.sync = true; puts 'ready'; while STDIN.gets; puts 'hello'; end"
  return {
    command: [jruby(), '-e', script],
    cold: [jruby(), '-e', "puts 'hello'"],
    settleMs: 3_000,
  }
}
