/** `warmfork flatten`: makes a generation with one page file out of one that maps those of its ancestors. Its supervisor must not run. */
import type { Command } from 'commander'
import { WarmforkError } from '../errors.js'
import { flattenGeneration } from '../flatten.js'
import { subcommand } from './command.js'
import { print, printJson } from './output.js'
import { formatMiB, parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddressed } from './store-address.js'

export function flattenCommand(): Command {
  const command = subcommand('flatten', 'rewrite a generation into one that needs no file of its ancestors', [
    ['warmfork flatten 12 --name shop', 'makes the next generation, with the content of generation 12'],
  ]).argument('<number>', 'the generation', parseNumber)
  return addStoreOptions(command).action(async (number: number, flags: StoreAddressed) => {
    const { root, name, running } = await addressedStore(flags)
    if (running) {
      throw new WarmforkError('STORE_LOCKED', {
        tried: `flatten generation ${number} of ${name}`,
        happened: 'its supervisor runs',
        remedy: `Stop it first: \`warmfork stop --name ${name}\`.`,
      })
    }
    const flattened = await flattenGeneration({ name, store: root, generation: number })
    if (flags.json) printJson({ name, store: root, ...flattened })
    else if (flattened.number === number) print(`generation ${number} of ${name} is flat already`)
    else {
      const written = formatMiB(flattened.writtenBytes)
      print(`generation ${flattened.number} of ${name} has the content of generation ${number}: ${written} MiB written`)
    }
  })
}
