package tokenwire_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestReadme holds every Go snippet of the README against the examples, which are compiled and run:
// a snippet must stand in example_test.go, or be examples/story, line for line but for the indentation.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	story, err := os.ReadFile("examples/story/main.go")
	if err != nil {
		t.Fatal(err)
	}
	unindented := func(text string) string {
		var lines []string
		for _, line := range strings.Split(text, "\n") {
			lines = append(lines, strings.TrimLeft(line, "\t"))
		}
		return strings.Join(lines, "\n")
	}
	examples := "\n" + unindented(string(code)+string(story))
	snippets := regexp.MustCompile("(?ms)^```go\n(.*?)^```").FindAllStringSubmatch(string(readme), -1)
	if sections := strings.Count(string(readme), "\n## "); len(snippets) < sections-2 {
		t.Errorf("found %d snippets in %d sections", len(snippets), sections)
	}
	for _, snippet := range snippets {
		if !strings.Contains(examples, "\n"+unindented(snippet[1])) {
			t.Errorf("not an example that runs:\n%s", snippet[1])
		}
	}
}
