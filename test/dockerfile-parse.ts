/**
 * Reads a Dockerfile into its instructions. It knows the syntax (continued lines, comments, flags, JSON forms) and not what an
 * instruction does.
 */

export interface Instruction {
  /** In capitals. */
  readonly name: string
  /** Where it begins, from 1. */
  readonly line: number
  /** All behind the name, continued lines joined. */
  readonly text: string
  /** `--from=build` gives `from`. */
  readonly flags: Readonly<Record<string, string>>
  /** The words behind the flags, or the strings of the JSON form. */
  readonly args: readonly string[]
  /** Whether it is in the JSON form. */
  readonly json: boolean
}

export function parseDockerfile(text: string): Instruction[] {
  const instructions: Instruction[] = []
  let pending = ''
  let start = 0
  for (const [index, raw] of text.split('\n').entries()) {
    if (/^\s*(#|$)/.test(raw)) continue
    if (pending === '') start = index + 1
    if (raw.endsWith('\\')) {
      pending += `${raw.slice(0, -1)} `
      continue
    }
    instructions.push(parseInstruction(pending + raw, start))
    pending = ''
  }
  if (pending !== '') throw new Error(`line ${start}: the last line is continued`)
  return instructions
}

function parseInstruction(source: string, line: number): Instruction {
  const match = /^\s*([A-Za-z]+)\s+(.*)$/s.exec(source)
  if (!match) throw new Error(`line ${line}: no instruction`)
  const text = match[2]!.trim()
  const flags: Record<string, string> = {}
  let rest = text
  for (let flag = nextFlag(rest); flag; flag = nextFlag(rest)) {
    flags[flag[1]!] = flag[2]!
    rest = rest.slice(flag[0].length)
  }
  const json = rest.startsWith('[')
  return { name: match[1]!.toUpperCase(), line, text, flags, args: json ? JSON.parse(rest) : rest.split(/\s+/), json }
}

const nextFlag = (text: string) => /^--([a-z-]+)=(\S+)\s+/.exec(text)

/** The instructions of each stage, its `FROM` first. */
export function stagesOf(instructions: readonly Instruction[]): Instruction[][] {
  const stages: Instruction[][] = []
  for (const instruction of instructions) {
    if (instruction.name === 'FROM') stages.push([])
    const stage = stages.at(-1)
    if (!stage) throw new Error(`line ${instruction.line}: ${instruction.name} before FROM`)
    stage.push(instruction)
  }
  return stages
}
