/** `warmfork import`: makes a generation of an archive. The supervisor of that name must not run. */
import type { Command } from 'commander'
import { importGeneration } from '../archive.js'
import { JSON_OPTION, STORE_OPTION, subcommand } from './command.js'
import { ending } from './ending.js'
import { readKey } from './export.js'
import { print, printJson } from './output.js'
import { formatDuration, formatMiB } from './quantities.js'

interface ImportFlags {
  readonly name?: string
  readonly store?: string
  readonly digest?: string
  readonly verify?: string
  readonly json?: boolean
}

export function importCommand(): Command {
  return subcommand('import', 'make a generation of an archive of `warmfork export`', [
    ['warmfork import shop.tar.zst --digest sha256:…', 'exactly the one whose digest `export` printed'],
    ['warmfork import shop.tar.zst --verify pub.pem --name shop2', 'one that was signed, for another supervisor'],
    ['ssh other warmfork export -o - | warmfork import -', 'without a file'],
  ])
    .argument('<file>', 'the archive, or - for stdin')
    .option('-n, --name <name>', 'whose generation it is to be; by default the name in the archive')
    .option(...STORE_OPTION)
    .option('--digest <digest>', 'refuse an archive with another digest')
    .option('--verify <file>', 'refuse an archive that this public ed25519 key (PEM) has not signed')
    .option(...JSON_OPTION)
    .action(async (file: string, { name, store, digest, verify, json }: ImportFlags) => {
      const key = verify === undefined ? undefined : readKey(verify, '--verify')
      const before = performance.now()
      const imported = await ending((signal) =>
        importGeneration({
          ...{ file: file === '-' ? process.stdin : file, signal },
          ...(name === undefined ? {} : { name }),
          ...(store === undefined ? {} : { store }),
          ...(digest === undefined ? {} : { digest }),
          ...(key === undefined ? {} : { verify: key }),
        }),
      )
      if (json) return printJson(imported)
      const { number, dataBytes, from, signedBy } = imported
      const took = formatDuration(performance.now() - before)
      print(`imported generation ${number} of ${imported.name}: ${formatMiB(dataBytes)} MiB, in ${took}`)
      print(`it was generation ${from.number} of ${from.name}, made ${from.createdAt.toISOString()}`)
      print(`digest ${imported.digest}`)
      if (signedBy !== undefined) print(`signed by ${signedBy}${verify === undefined ? ' (not verified)' : ''}`)
    })
}
