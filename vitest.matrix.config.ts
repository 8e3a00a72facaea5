import { defineConfig } from 'vitest/config'

// The runtimes one after the other: two cores are not enough to measure two forks at once.
export default defineConfig({
  test: {
    // The latter have tests that run here only, since JRuby takes seconds for each start.
    include: [
      'test/matrix/**/*.matrix.ts',
      'test/agents-jruby.test.ts',
      'test/agents-conformance.test.ts',
      'test/agents-ruby-requests.test.ts',
    ],
    env: { WARMFORK_TEST_MATRIX: '1' },
    fileParallelism: false,
    testTimeout: 300_000,
    hookTimeout: 900_000,
  },
})
