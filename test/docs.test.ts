import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import type { Command } from 'commander'
import ts from 'typescript'
import { describe, expect, test } from 'vitest'

const root = join(import.meta.dirname, '..')
const read = (name: string) => readFileSync(join(root, name), 'utf8')

const NOT_OURS = new Set(['node_modules', 'dist', '.git', '.cache'])

function markdownFiles(directory = root): string[] {
  return readdirSync(directory, { withFileTypes: true }).flatMap((entry) => {
    if (NOT_OURS.has(entry.name)) return []
    const path = join(directory, entry.name)
    if (entry.isDirectory()) return markdownFiles(path)
    return entry.name.endsWith('.md') ? [path] : []
  })
}

const documents = markdownFiles().map((path) => ({
  path,
  name: relative(root, path),
  text: readFileSync(path, 'utf8'),
}))

/** Without what stands in code, where brackets mean something else. */
function prose(text: string): string {
  return text.replaceAll(/^(`{3,}).*?^\1/gms, '').replaceAll(/`[^`\n]*`/g, '')
}

/** As GitHub makes them of headings. */
function anchorsOf(text: string): Set<string> {
  const anchors = new Set<string>()
  const headings = text.replaceAll(/^(`{3,}).*?^\1/gms, '').matchAll(/^#{1,6} (.+)$/gm)
  for (const [, heading] of headings) {
    const slug = heading!
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
      .replaceAll(' ', '-')
    let anchor = slug
    for (let n = 1; anchors.has(anchor); n++) anchor = `${slug}-${n}`
    anchors.add(anchor)
  }
  return anchors
}

function linksOf(text: string): string[] {
  return [...prose(text).matchAll(/\]\(([^)\s]+)\)/g)].map(([, target]) => target!)
}

describe('links', () => {
  const links = documents.flatMap(({ path, name, text }) =>
    linksOf(text)
      .filter((target) => !/^[a-z]+:/.test(target))
      .map((target) => ({ path, name, target })),
  )

  test('are found', () => {
    expect(links.length).toBeGreaterThan(30)
  })

  test.each(links)('$name: $target leads somewhere', ({ path, target }) => {
    const [file = '', anchor] = target.split('#')
    const found = file === '' ? path : resolve(dirname(path), decodeURI(file))
    expect(existsSync(found)).toBe(true)
    if (anchor !== undefined) expect([...anchorsOf(readFileSync(found, 'utf8'))]).toContain(anchor)
  })

  test('every document is linked from the README, or from one that is', () => {
    const reached = new Set([join(root, 'README.md')])
    for (const path of reached) {
      for (const target of linksOf(readFileSync(path, 'utf8'))) {
        const found = resolve(dirname(path), target.split('#')[0]!)
        if (found.endsWith('.md') && existsSync(found)) reached.add(found)
      }
    }
    const lost = documents.filter(({ name, path }) => name.startsWith('docs/') && !reached.has(path))
    expect(lost.map(({ name }) => name)).toEqual([])
  })

  test('https is used for all that leads outside', () => {
    expect(documents.flatMap(({ text }) => linksOf(text)).filter((target) => target.startsWith('http:'))).toEqual([])
  })
})

describe('samples', () => {
  const samples = documents.flatMap(({ name, text }) =>
    [...text.matchAll(/^```(ts|js)\n(.*?)^```$/gms)].map(([, language, code], index) => ({
      sample: `${name} ${index + 1} (${language})`,
      code: code!,
    })),
  )

  test('are found', () => {
    expect(samples.length).toBeGreaterThan(2)
  })

  test('type-check against the sources', { timeout: 60_000 }, () => {
    const files = new Map(samples.map(({ code }, index) => [join(root, 'test', `.sample-${index}.ts`), code]))
    const options: ts.CompilerOptions = {
      ...ts.parseJsonConfigFileContent(JSON.parse(read('tsconfig.json')), ts.sys, root).options,
      paths: {
        warmfork: [join(root, 'src/index.ts')],
        'warmfork/worker': [join(root, 'src/agents/node/worker.ts')],
      },
      noEmit: true,
    }
    const host = ts.createCompilerHost(options)
    const { getSourceFile, fileExists, readFile } = host
    host.fileExists = (path) => files.has(path) || fileExists(path)
    host.readFile = (path) => files.get(path) ?? readFile(path)
    host.getSourceFile = (path, target) =>
      files.has(path) ? ts.createSourceFile(path, files.get(path)!, target) : getSourceFile(path, target)
    const program = ts.createProgram([...files.keys()], options, host)
    const wrong = [...files.keys()].flatMap((path, index) => {
      const source = program.getSourceFile(path)!
      return [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)].map(
        ({ messageText }) => `${samples[index]!.sample}: ${ts.flattenDiagnosticMessageText(messageText, ' ')}`,
      )
    })
    expect(wrong).toEqual([])
  })
})

/** The members of the interfaces and classes of a source file, each with its `@default` where it has one. */
function membersOf(file: string): Map<string, { name: string; fallback: string | undefined }[]> {
  const source = ts.createSourceFile(file, read(file), ts.ScriptTarget.Latest, true)
  const found = new Map<string, { name: string; fallback: string | undefined }[]>()
  source.forEachChild((node) => {
    if (!ts.isInterfaceDeclaration(node) && !ts.isClassDeclaration(node)) return
    const members = [...node.members].flatMap((member) => {
      if (!member.name || ts.isPrivateIdentifier(member.name) || ts.isComputedPropertyName(member.name)) return []
      const isPrivate = ts.canHaveModifiers(member)
        ? ts.getModifiers(member)?.some(({ kind }) => kind === ts.SyntaxKind.PrivateKeyword)
        : false
      const tags = ts.getJSDocTags(member)
      if (isPrivate || tags.some((tag) => tag.tagName.text === 'internal')) return []
      const tag = tags.find(({ tagName }) => tagName.text === 'default')
      return [{ name: member.name.getText(source), fallback: tag && ts.getTextOfJSDocComment(tag.comment) }]
    })
    found.set(node.name!.text, members)
  })
  return found
}

function section(text: string, heading: string): string {
  const level = /^#+/.exec(heading)![0].length
  const start = text.split('\n').indexOf(heading)
  expect(start, `the heading ${heading}`).toBeGreaterThanOrEqual(0)
  const lines = text.split('\n').slice(start + 1)
  const end = lines.findIndex((line) => new RegExp(`^#{1,${level}} `).test(line))
  return lines.slice(0, end < 0 ? undefined : end).join('\n')
}

/** The rows of the tables in a text, by each name that stands in backticks in the first column. */
function rowsOf(text: string): Map<string, string> {
  const rows = new Map<string, string>()
  for (const line of text.split('\n')) {
    const first = /^\| (.+?) \|/.exec(line)?.[1]
    for (const [, name] of first?.matchAll(/`([A-Za-z]+)[^`]*`/g) ?? []) rows.set(name!, line)
  }
  return rows
}

const plain = (text: string) => text.replaceAll('`', '').replaceAll(/\s+/g, ' ').replaceAll('\\|', '|').trim()

describe('docs/options.md', () => {
  const page = read('docs/options.md')
  const options = membersOf('src/options.ts')
  const supervisor = new Map([
    ...membersOf('src/supervisor.ts'),
    ...membersOf('src/fork-request.ts'),
    ...membersOf('src/archive.ts'),
  ])
  const groups: [heading: string, ...names: string[]][] = [
    ['## Options of a supervisor', 'SupervisorOptions'],
    ['### template', 'TemplateOptions'],
    ['### pool', 'PoolOptions'],
    ['### crashes', 'CrashOptions'],
    ['### ready', ...[...options.keys()].filter((name) => name.startsWith('ReadyBy')), 'Timed'],
    ['### warmup', ...[...options.keys()].filter((name) => name.startsWith('WarmupBy')), 'TimedWarmup'],
    ['## fork', 'ForkRequest'],
    ['### exportGeneration', 'ExportOptions'],
    ['### importGeneration', 'ImportOptions'],
  ]

  test.each(groups)('has every option of %s, and no other', (heading, ...names) => {
    const known = names.flatMap((name) => options.get(name) ?? supervisor.get(name) ?? [])
    expect(known.length).toBeGreaterThan(0)
    const text = section(page, heading)
    const own = heading === '## Options of a supervisor' ? text.slice(0, text.indexOf('\n### ')) : text
    expect([...rowsOf(own).keys()].sort()).toEqual([...new Set(known.map(({ name }) => name))].sort())
  })

  test.each(groups)('has the defaults of %s as the sources say them', (heading, ...names) => {
    const rows = rowsOf(section(page, heading).split('\n### ')[0]!)
    const different = names
      .flatMap((name) => options.get(name) ?? supervisor.get(name) ?? [])
      .filter(({ name, fallback }) => {
        const column = rows.get(name)?.split(/(?<!\\)\|/)[2] ?? ''
        return fallback !== undefined && plain(column) !== plain(fallback)
      })
    expect(different).toEqual([])
  })

  test.each([
    ['## Supervisor', 'src/supervisor.ts', 'Supervisor', ['start', 'resizePool']],
    ['## Child', 'src/child.ts', 'Child', []],
  ])('has every public member of %s', (heading, file, name, elsewhere: readonly string[]) => {
    const text = section(page, heading)
    const lost = membersOf(file)
      .get(name)!
      .filter((member) => !elsewhere.includes(member.name) && !new RegExp(`\`${member.name}\\b`).test(text))
    expect(lost.map((member) => member.name)).toEqual([])
  })

  test('has every event of a supervisor, and no other', () => {
    const events = [
      ...supervisor.get('SupervisorEvents')!,
      ...membersOf('src/refork/changes.ts').get('ChangeEvents')!,
    ].map(({ name }) => name)
    const table = section(page, '## Supervisor').split('It is an event emitter:')[1]!
    expect([...rowsOf(table).keys()].sort()).toEqual(events.sort())
  })
})

describe('docs/cli.md', () => {
  const page = read('docs/cli.md')
  const table = /SUBCOMMANDS[^{]*= \{(.*?)\n\}/s.exec(read('src/cli/main.ts'))![1]!
  const names = [...table.matchAll(/^ {2}(\w+): /gm)].map(([, name]) => name!)
  const documented = [...page.matchAll(/^## warmfork (\w+)$/gm)].map(([, name]) => name!)

  test('has every subcommand, and no other', () => {
    expect(names.length).toBeGreaterThan(5)
    expect([...documented].sort()).toEqual([...names].sort())
  })

  test.each(names)('has every flag of %s', async (name) => {
    const module = (await import(`../src/cli/${name}.ts`)) as Record<string, (...args: unknown[]) => Command>
    const command = module[`${name}Command`]!(async () => undefined)
    const text = section(page, `## warmfork ${name}`)
    const flags = command.options.flatMap(({ short, long }) => [short, long]).filter((flag) => flag !== undefined)
    expect(flags.filter((flag) => !new RegExp(`\`${flag}[\` ]`).test(text))).toEqual([])
    const mentioned = [...text.matchAll(/`(--?[a-z][a-z-]*)/g)].map(([, flag]) => flag!)
    expect(mentioned.filter((flag) => !flags.includes(flag))).toEqual([])
  })
})

describe('the layout in the README', () => {
  const block = /```text\nsrc\/\n(.*?)```/s.exec(read('README.md'))![1]!
  const paths = block
    .split('\n')
    .filter(Boolean)
    .flatMap((line) => [...line.split(/ {3,}/)[0]!.matchAll(/[\w-]+(?:\.ts|\/)/g)].map(([path]) => path))

  test('names only what is there', () => {
    expect(paths.length).toBeGreaterThan(15)
    expect(paths.filter((path) => !existsSync(join(root, 'src', path)))).toEqual([])
  })

  test('has every directory of src', () => {
    const directories = readdirSync(join(root, 'src')).filter((name) => statSync(join(root, 'src', name)).isDirectory())
    expect(directories.filter((name) => !paths.includes(`${name}/`))).toEqual([])
  })
})

test('the blocks that commands write are there, each with both of its marks', () => {
  const marks = [
    ['README.md', 'demo'],
    ['docs/limits.md', 'matrix'],
  ]
  for (const [file, mark] of marks) {
    expect(read(file!)).toMatch(new RegExp(`<!-- ${mark}:start -->\\n(?:.*\\n)?<!-- ${mark}:end -->`, 's'))
  }
})
