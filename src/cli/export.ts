/** `warmfork export`: writes a generation into one file. The supervisor need not run. */
import { readFileSync } from 'node:fs'
import { isatty } from 'node:tty'
import { type Command, Option } from 'commander'
import { type Compression, exportGeneration } from '../archive.js'
import { WarmforkError } from '../errors.js'
import { COMPRESSIONS } from '../generations/archive/blocks.js'
import { subcommand } from './command.js'
import { ending } from './ending.js'
import { print, printError } from './output.js'
import { formatDuration, formatMiB, parseNumber } from './quantities.js'
import { addressedStore, addStoreOptions, type StoreAddressed } from './store-address.js'

interface ExportFlags extends StoreAddressed {
  readonly output: string
  readonly compress: Compression
  readonly sign?: string
  readonly force?: boolean
}

export function exportCommand(): Command {
  const command = subcommand('export', 'write a generation into one file, for another machine of the same kind', [
    ['warmfork export -o shop.tar.zst', 'the generation that forks come from'],
    ['warmfork export 3 -o shop.tar --compress none --force', 'generation 3, in place of what is there'],
    ['warmfork export -o - | ssh other warmfork import -', 'without a file'],
  ])
    .argument('[number]', 'the generation; by default the one that forks come from', parseNumber)
    .requiredOption('-o, --output <file>', 'the archive, or - for stdout')
    .addOption(new Option('--compress <how>', 'how it is compressed').choices(COMPRESSIONS).default('zstd'))
    .option('--sign <file>', 'a private ed25519 key (PEM) to sign it with')
    .option('-f, --force', 'replace a file that is there')
  return addStoreOptions(command).action(async (number: number | undefined, flags: ExportFlags) => {
    const { output, compress, force = false } = flags
    const toStdout = output === '-'
    if (toStdout && isatty(1)) {
      const remedy = 'Name a file, or send it to another program.'
      throw new WarmforkError('BAD_OPTION', { tried: 'export a generation', happened: 'stdout is a terminal', remedy })
    }
    const { root, name, running } = await addressedStore(flags)
    // A supervisor that was rolled back forks from an older one than the newest.
    const chosen = number ?? (running?.generation || undefined)
    const sign = flags.sign === undefined ? undefined : readKey(flags.sign, '--sign')
    const before = performance.now()
    const exported = await ending((signal) =>
      exportGeneration({
        ...{ name, store: root, compress, force, signal },
        file: toStdout ? process.stdout : output,
        ...(chosen === undefined ? {} : { generation: chosen }),
        ...(sign === undefined ? {} : { sign }),
      }),
    )
    const tell = toStdout ? printError : print
    if (flags.json) tell(JSON.stringify({ ...exported, ...(toStdout ? {} : { file: output }) }, null, 2))
    else {
      const { archiveBytes, dataBytes, signedBy } = exported
      const size = `${formatMiB(archiveBytes)} MiB, of ${formatMiB(dataBytes)}`
      tell(
        `exported generation ${exported.number} of ${name}: ${size}, in ${formatDuration(performance.now() - before)}`,
      )
      tell(`digest ${exported.digest}`)
      if (signedBy !== undefined) tell(`signed by ${signedBy}`)
    }
  })
}

/** The text of a key's file. Throws BAD_OPTION. */
export function readKey(path: string, flag: string): Buffer {
  try {
    return readFileSync(path)
  } catch (cause) {
    const happened = cause instanceof Error ? cause.message : String(cause)
    throw new WarmforkError('BAD_OPTION', { tried: `read the key of \`${flag}\``, happened, cause })
  }
}
