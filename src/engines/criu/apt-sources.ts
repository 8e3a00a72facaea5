/**
 * Reads apt's own configuration of sources, in both of its forms, to find the mirror of Debian's main archive that this
 * machine already uses. It knows apt's file formats; it runs nothing and decides nothing about criu.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

export interface AptSource {
  readonly uri: string
  readonly suites: readonly string[]
  readonly components: readonly string[]
  /** Absolute paths of keyrings; empty where apt's trusted keys are used, or where the key stands in the file itself. */
  readonly signedBy: readonly string[]
}

/** A one-line file (`sources.list`, `*.list`): `deb [options] uri suite component…`. Lines for source packages are left out. */
export function parseOneLine(text: string): AptSource[] {
  return text.split('\n').flatMap((raw) => {
    const line = raw.replace(/#.*/, '').trim()
    const found = /^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$/.exec(line)
    if (!found) return []
    const signedBy = /(?:^|\s)signed-by=(\S+)/i.exec(found[1] ?? '')?.[1]?.split(',') ?? []
    return {
      uri: found[2]!,
      suites: [found[3]!],
      components: words(found[4]!),
      signedBy: signedBy.filter((path) => path.startsWith('/')),
    }
  })
}

/** A deb822 file (`*.sources`): paragraphs of fields, continued by indented lines. Disabled ones are left out. */
export function parseDeb822(text: string): AptSource[] {
  const withoutComments = text.split('\n').filter((line) => !line.startsWith('#'))
  const paragraphs = withoutComments.join('\n').split(/\n[ \t]*\n/)
  return paragraphs.flatMap((paragraph) => {
    const fields = new Map<string, string>()
    let name = ''
    for (const line of paragraph.split('\n')) {
      const field = /^([\w-]+):\s*(.*)$/.exec(line)
      if (field) {
        name = field[1]!.toLowerCase()
        fields.set(name, field[2]!)
      } else if (/^\s/.test(line) && name) {
        fields.set(name, `${fields.get(name)}\n${line.trim()}`)
      }
    }
    const get = (field: string) => words(fields.get(field) ?? '')
    if (
      /^(no|false|without|off|disable|0)$/i.test(fields.get('enabled')?.trim() ?? '') ||
      !get('types').includes('deb')
    )
      return []
    return get('uris').map((uri) => ({
      uri,
      suites: get('suites'),
      components: get('components'),
      signedBy: get('signed-by').filter((path) => path.startsWith('/')),
    }))
  })
}

/**
 * The sources that are mirrors of Debian's main archive, the likeliest first. Not the security archive (it has no
 * `testing`), not third parties', though those often use Debian's suite names: a mirror is signed by Debian's keyring, or
 * its path ends in `/debian` as the archive's own rules ask of mirrors.
 */
export function debianMirrors(sources: readonly AptSource[]): AptSource[] {
  const scored = sources.flatMap((source) => {
    const main = source.components.includes('main') && source.suites.some((suite) => /^[a-z]+$/.test(suite))
    // A CD has no other suites than its own.
    if (!main || source.uri.startsWith('cdrom:') || /debian-security/.test(source.uri)) return []
    const signed = source.signedBy.some((path) => /debian-archive/.test(path))
    const named = /\/debian\/?$/.test(source.uri)
    const score = (signed ? 2 : 0) + (named ? 1 : 0) - (source.signedBy.length > 0 && !signed ? 1 : 0)
    return score > 0 ? { source, score } : []
  })
  scored.sort((a, b) => b.score - a.score)
  const seen = new Set<string>()
  return scored.flatMap(({ source }) => {
    const key = source.uri.replace(/\/$/, '')
    if (seen.has(key)) return []
    seen.add(key)
    return source
  })
}

/** All binary sources that apt on this machine is configured with. Unreadable files are passed over, as apt does. */
export function readAptSources(etc = '/etc/apt'): AptSource[] {
  const parts = join(etc, 'sources.list.d')
  let names: string[] = []
  try {
    names = readdirSync(parts).sort()
  } catch {
    // Only the one file, then.
  }
  const files = [join(etc, 'sources.list'), ...names.map((name) => join(parts, name))]
  return files.flatMap((file) => {
    try {
      if (file.endsWith('.sources')) return parseDeb822(readFileSync(file, 'utf8'))
      if (file.endsWith('.list')) return parseOneLine(readFileSync(file, 'utf8'))
    } catch {
      // Passed over.
    }
    return []
  })
}

function words(text: string): string[] {
  return text.split(/\s+/).filter(Boolean)
}
