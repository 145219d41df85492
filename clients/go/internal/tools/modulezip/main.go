// Modulezip writes a Go module as a module proxy serves it, and proves that a program elsewhere
// builds with it.
package main

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/mod/module"
	modzip "golang.org/x/mod/zip"
)

func main() {
	log.SetFlags(0)
	path := flag.String("module", "", "path of the module")
	version := flag.String("version", "", "its version, such as v1.2.3")
	root := flag.String("root", "", "root of the repository, whose LICENSE the module carries")
	out := flag.String("out", "", "folder to serve by GOPROXY=file://...")
	flag.Parse()
	source := filepath.Join(*root, filepath.FromSlash(strings.TrimPrefix(*path, "github.com/tokenwire/tokenwire/")))
	if err := write(module.Version{Path: *path, Version: *version}, source, *root, *out); err != nil {
		log.Fatal(err)
	}
	if err := build(*path, *version, *out); err != nil {
		log.Fatal(err)
	}
}

// write makes the .zip, .mod and .info files of a version.
func write(m module.Version, source, root, out string) error {
	folder := filepath.Join(out, filepath.FromSlash(m.Path), "@v")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	files, err := tracked(source)
	if err != nil {
		return err
	}
	// As the go command does for a module below the root of its repository.
	files = append(files, file{"LICENSE", filepath.Join(root, "LICENSE")})
	var archive bytes.Buffer
	if err := modzip.Create(&archive, m, files); err != nil {
		return err
	}
	if _, err := zip.NewReader(bytes.NewReader(archive.Bytes()), int64(archive.Len())); err != nil {
		return err
	}
	mod, err := os.ReadFile(filepath.Join(source, "go.mod"))
	if err != nil {
		return err
	}
	info, err := json.Marshal(map[string]string{"Version": m.Version, "Time": "2000-01-01T00:00:00Z"})
	if err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		m.Version + ".zip": archive.Bytes(), m.Version + ".mod": mod, m.Version + ".info": info,
		"list": []byte(m.Version + "\n"),
	} {
		if err := os.WriteFile(filepath.Join(folder, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// tracked returns the files of the module that git knows, without those of modules within.
func tracked(source string) ([]modzip.File, error) {
	list := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	list.Dir = source
	names, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("git ls-files: %w", err)
	}
	var files []modzip.File
	for _, name := range strings.Split(strings.TrimRight(string(names), "\x00"), "\x00") {
		if strings.HasPrefix(name, "internal/tools/") {
			continue
		}
		if _, err := os.Stat(filepath.Join(source, name)); errors.Is(err, fs.ErrNotExist) {
			continue // removed, and not committed yet
		}
		files = append(files, file{name, filepath.Join(source, name)})
	}
	return files, nil
}

type file struct{ name, path string }

func (f file) Path() string                 { return f.name }
func (f file) Lstat() (fs.FileInfo, error)  { return os.Lstat(f.path) }
func (f file) Open() (io.ReadCloser, error) { return os.Open(f.path) }

const program = `package main

import (
	"context"
	"fmt"

	tokenwire "github.com/tokenwire/tokenwire/clients/go"
	"github.com/tokenwire/tokenwire/clients/go/tokenwiretest"
)

func main() {
	gateway, err := tokenwiretest.Start()
	if err != nil {
		panic(err)
	}
	gateway.Reply(tokenwiretest.Text("from outside"))
	client, err := tokenwire.New(gateway.Target)
	if err != nil {
		panic(err)
	}
	reply, err := client.Chat(context.Background(), tokenwire.Request{Model: "m", Prompt: "Hi"})
	if err != nil {
		panic(err)
	}
	fmt.Print(reply.Text())
}
`

// build makes a module that requires this one from the files just written, and runs its program.
func build(path, version, out string) error {
	folder, err := os.MkdirTemp("", "tokenwire-consumer-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	if err := os.WriteFile(filepath.Join(folder, "main.go"), []byte(program), 0o644); err != nil {
		return err
	}
	settings, err := exec.Command("go", "env", "GOPROXY", "GOMODCACHE").Output()
	if err != nil {
		return err
	}
	usual, cache, _ := strings.Cut(strings.TrimSpace(string(settings)), "\n")
	proxies := []string{
		"file://" + out, "file://" + filepath.ToSlash(filepath.Join(cache, "cache", "download")), usual,
	}
	for _, command := range [][]string{
		{"mod", "init", "example.com/consumer"},
		{"get", path + "@" + version},
		{"run", "."},
	} {
		run := exec.Command("go", command...)
		run.Dir = folder
		run.Env = append(os.Environ(),
			"GOPROXY="+strings.Join(proxies, ","), "GOFLAGS=-modcacherw -buildvcs=false", "GOWORK=off",
			// A cache of its own, filled from the usual one: this version must not stay in that.
			"GOMODCACHE="+filepath.Join(folder, "modules"),
			// What the cache holds was checked against go.sum; this version is in no database.
			"GONOSUMDB=*")
		output, err := run.CombinedOutput()
		if err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(command, " "), err, output)
		}
		if command[0] == "run" && string(output) != "from outside" {
			return fmt.Errorf("the program printed %q", output)
		}
	}
	return nil
}
