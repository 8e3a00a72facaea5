/** How a generation's own page file is called: the shim knows page files by the end of their names. */
export const pageFileName = (generation: number): string => `memory-${generation}.warmfork-pages`
