/** `warmfork demo`: the main job on a Node program of 500 MiB, with its figures beside those of the other ways. */
import { Command } from 'commander'
import type { FiguresOptions } from '../demo/figures.js'
import { print } from './output.js'
import { parseCount } from './quantities.js'

export function demoCommand(): Command {
  return new Command('demo')
    .description('fork a program of 500 MiB and show the figures: cold start, stock restore, fork, fork(2)')
    .option('--mib <n>', 'size of the program', parseCount, 500)
    .option('--rounds <n>', 'how often each is measured; medians are shown', parseCount, 10)
    .option('--json', 'print the figures as JSON')
    .action(async ({ mib, rounds, json }: { mib: number; rounds: number; json?: boolean }) => {
      // Loaded here, so that the other subcommands start without it.
      const { measureFigures, nodeProgram } = await import('../demo/figures.js')
      const { figuresTable } = await import('./figures-table.js')
      const options: FiguresOptions = {
        program: nodeProgram(mib),
        rounds,
        coldRounds: Math.min(3, rounds),
        throughputForks: 0,
        onStep: (step) => process.stderr.write(`  ${step}\n`),
      }
      if (!json) {
        print(
          `A Node program of ${mib} MiB is started in six ways. Medians of ${rounds}, all in one run on this machine.\n`,
        )
      }
      const figures = await measureFigures(options)
      print(json ? JSON.stringify(figures, null, 2) : `\n${figuresTable(figures)}\n\n${NEXT}`)
    })
}

const NEXT = `Try it with a program of yours:
  warmfork run --name mine --ready-output ready -- node app.js    in one terminal
  warmfork fork --name mine                                       in another: a warm copy, on that terminal
docs/how-it-works.md says what happens in a fork, docs/limits.md what cannot be forked.`
