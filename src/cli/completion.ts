/**
 * `warmfork completion`: scripts for shells, made from the commands themselves: a flag that exists is completed, and nothing else is.
 * It knows no particular command.
 */
import { Argument, type Command, type Option } from 'commander'
import { subcommand } from './command.js'
import { print } from './output.js'

const SHELLS = ['bash', 'zsh', 'fish'] as const
type Shell = (typeof SHELLS)[number]

/** @param loadAll gives the program with all its subcommands */
export function completionCommand(loadAll: () => Promise<Command>): Command {
  return subcommand('completion', 'print a script that completes subcommands and flags in a shell', [
    ['source <(warmfork completion bash)', 'bash, in ~/.bashrc'],
    ['source <(warmfork completion zsh)', 'zsh, in ~/.zshrc'],
    ['warmfork completion fish > ~/.config/fish/completions/warmfork.fish', 'fish'],
  ])
    .addArgument(new Argument('<shell>', 'bash, zsh or fish').choices(SHELLS))
    .action(async (shell: Shell) => print(WRITERS[shell](describe(await loadAll()))))
}

interface Flag {
  readonly names: readonly string[]
  readonly description: string
  /** Undefined for one without a value. */
  readonly value: { readonly choices: readonly string[]; readonly kind: 'directory' | 'file' | 'other' } | undefined
}

interface Described {
  readonly name: string
  readonly summary: string
  readonly flags: readonly Flag[]
  /** What its arguments can be; `command` for one that takes a command line, `file` for one that takes a file. */
  readonly operands: readonly string[] | 'command' | 'file'
}

function describe(program: Command): Described[] {
  return program
    .createHelp()
    .visibleCommands(program)
    .map((command) => ({
      name: command.name(),
      summary: command.summary(),
      flags: command.createHelp().visibleOptions(command).map(flagOf),
      operands:
        command.registeredArguments.some(({ variadic }) => variadic) && command.name() === 'run'
          ? 'command'
          : operandsOf(command),
    }))
}

function operandsOf(command: Command): readonly string[] | 'file' {
  if (command.registeredArguments.some((argument) => argument.name() === 'file')) return 'file'
  return command.registeredArguments.flatMap(({ argChoices }) => argChoices ?? [])
}

function flagOf(option: Option): Flag {
  const takesValue = option.required || option.optional
  const kind = /<directory>|<dir>/.test(option.flags) ? 'directory' : /<file>/.test(option.flags) ? 'file' : 'other'
  return {
    names: [option.short, option.long].filter((name) => name !== undefined),
    description: option.description,
    value: takesValue ? { choices: option.argChoices ?? [], kind } : undefined,
  }
}

const WRITERS: Readonly<Record<Shell, (commands: readonly Described[]) => string>> = { bash, zsh, fish }

const namesOf = (flags: readonly Flag[]) => flags.flatMap(({ names }) => names)

function bash(commands: readonly Described[]): string {
  const cases = commands.map(({ name, flags, operands }) => {
    const values = flags.flatMap(({ names, value }) => {
      if (!value) return []
      const words = `COMPREPLY=($(compgen ${value.kind === 'directory' ? '-d' : value.choices.length > 0 ? `-W '${value.choices.join(' ')}'` : value.kind === 'file' ? '-f' : "-W ''"} -- "$current"))`
      return [`        ${names.join('|')}) ${words}; return ;;`]
    })
    const rest =
      operands === 'command'
        ? '      [[ $current != -* ]] && { COMPREPLY=($(compgen -c -f -- "$current")); return; }'
        : `      [[ $current != -* ]] && { COMPREPLY=($(compgen ${operands === 'file' ? '-f' : `-W '${operands.join(' ')}'`} -- "$current")); return; }`
    return `    ${name})
      case $previous in
${values.join('\n')}
      esac
${rest}
      COMPREPLY=($(compgen -W '${namesOf(flags).join(' ')}' -- "$current")) ;;`
  })
  return `# Completion of warmfork for bash.
_warmfork() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD-1]}
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W '${commands.map(({ name }) => name).join(' ')} --help --version' -- "$current"))
    return
  fi
  case \${COMP_WORDS[1]} in
${cases.join('\n')}
  esac
}
complete -F _warmfork warmfork`
}

/** For use between single quotes in zsh and fish. */
const quoted = (text: string) => text.replaceAll("'", "'\\''")

function zsh(commands: readonly Described[]): string {
  const specification = ({ names, description, value }: Flag) => {
    const text = description.replace(/[[\]:\\]/g, '\\$&')
    const action = !value
      ? ''
      : value.choices.length > 0
        ? `:value:(${value.choices.join(' ')})`
        : { directory: ':directory:_files -/', file: ':file:_files', other: ':value: ' }[value.kind]
    return names.map((name) => `      '*${name}[${quoted(text)}]${action}'`).join(' \\\n')
  }
  const cases = commands.map(({ name, flags, operands }) => {
    const rest =
      operands === 'command'
        ? ["'*::command:_normal'"]
        : operands === 'file'
          ? ["'1:file:_files'"]
          : operands.length > 0
            ? [`'1:argument:(${operands.join(' ')})'`]
            : []
    const lines = [...flags.map(specification), ...rest.map((line) => `      ${line}`)]
    return `    ${name}) _arguments \\\n${lines.join(' \\\n')} ;;`
  })
  const list = commands.map(({ name, summary }) => `      '${name}:${quoted(summary.replaceAll(':', '\\:'))}'`)
  return `#compdef warmfork
# Completion of warmfork for zsh.
_warmfork() {
  if (( CURRENT == 2 )); then
    local -a commands
    commands=(
${list.join('\n')}
    )
    _describe command commands
    return
  fi
  local name=$words[2]
  shift words
  (( CURRENT-- ))
  case $name in
${cases.join('\n')}
  esac
}
compdef _warmfork warmfork`
}

function fish(commands: readonly Described[]): string {
  const lines = ['# Completion of warmfork for fish.', 'complete -c warmfork -f']
  for (const { name, summary, flags, operands } of commands) {
    lines.push(`complete -c warmfork -n __fish_use_subcommand -a ${name} -d '${quotedFish(summary)}'`)
    const within = `complete -c warmfork -n '__fish_seen_subcommand_from ${name}'`
    for (const { names, description, value } of flags) {
      const words = names.map((each) => (each.startsWith('--') ? `-l ${each.slice(2)}` : `-s ${each.slice(1)}`))
      // Of a flag without them fish would offer files.
      if (value) words.push(value.kind === 'file' ? '-r' : '-x')
      if (value && value.choices.length > 0) words.push(`-a '${value.choices.join(' ')}'`)
      if (value?.kind === 'directory') words.push("-a '(__fish_complete_directories)'")
      if (value?.kind === 'file') words.push('-F')
      lines.push(`${within} ${words.join(' ')} -d '${quotedFish(description)}'`)
    }
    if (operands === 'command') lines.push(`${within} -a '(__fish_complete_subcommand)'`)
    else if (operands === 'file') lines.push(`${within} -F`)
    else if (operands.length > 0) lines.push(`${within} -a '${operands.join(' ')}'`)
  }
  return lines.join('\n')
}

const quotedFish = (text: string) => text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")
