{{- define "tokenwire.name" -}}
{{- if contains "tokenwire" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-tokenwire" (.Release.Name | trunc 40 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "tokenwire.selector" -}}
app.kubernetes.io/name: tokenwire
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tokenwire.labels" -}}
{{ include "tokenwire.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tokenwire.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- /* A duration of the configuration, such as 1m30s or 500ms, in seconds. */ -}}
{{- define "tokenwire.seconds" -}}
{{- if not (regexMatch "^([0-9]+([.][0-9]+)?(h|ms|m|s))+$" (toString .)) }}
{{- fail (printf "config.drain: got %v, expected a duration such as 30s or 1m30s" .) }}
{{- end }}
{{- $units := dict "h" 3600.0 "m" 60.0 "s" 1.0 "ms" 0.001 }}
{{- $sum := 0.0 }}
{{- range regexFindAll "[0-9.]+(h|ms|m|s)" (toString .) -1 }}
{{- $unit := regexFind "[a-z]+$" . }}
{{- $sum = addf $sum (mulf (float64 (trimSuffix $unit .)) (get $units $unit)) }}
{{- end }}
{{- $sum }}
{{- end }}

{{- /* `config` as a map. */ -}}
{{- define "tokenwire.config" -}}
{{- $config := fromYaml .Values.config }}
{{- with $config.Error }}{{ fail (printf "config: not YAML: %s" .) }}{{ end }}
{{- toJson $config }}
{{- end }}

{{- /* The number of the port that a section of `config` opens to others than the pod itself; empty
where it opens none. A list: the root, the section. */ -}}
{{- define "tokenwire.opened" -}}
{{- $section := get (include "tokenwire.config" (first .) | fromJson) (last .) | default dict }}
{{- $listen := $section.listen | default "" | toString }}
{{- if not (regexMatch "^(unix:|127[.]|localhost:|\\[::1\\]:)" $listen) }}{{ regexFind "[0-9]+$" $listen }}{{ end }}
{{- end }}

{{- /* A list, as JSON: the ports of everything that `config` names to be called. */ -}}
{{- define "tokenwire.calledPorts" -}}
{{- $config := include "tokenwire.config" . | fromJson }}
{{- $urls := list (dig "otlp" "endpoint" "" $config) (dig "redis" "url" "" $config) }}
{{- range ($config.upstreams | default (dict "openai" (dict "base_url" "https://"))) }}
{{- if kindIs "map" . }}{{ $urls = concat $urls (list .base_url .proxy) }}{{ end }}
{{- end }}
{{- $usual := dict "http" "80" "https" "443" "redis" "6379" "rediss" "6379" }}
{{- $ports := list }}
{{- range $urls }}
{{- with regexFind "^(https?|rediss?)://[^/]*" (toString .) }}
{{- $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" .) | default (get $usual (regexFind "^[a-z]+" .)) | int) }}
{{- end }}
{{- end }}
{{- $ports | uniq | toJson }}
{{- end }}

{{- /* From SIGTERM to the kill: what the gateway takes to drain, and the margin. 5s and 120s are what
the gateway takes where its file does not say. */ -}}
{{- define "tokenwire.terminationSeconds" -}}
{{- $config := include "tokenwire.config" . | fromJson }}
{{- $drain := $config.drain | default dict }}
{{- $propagation := include "tokenwire.seconds" ($drain.propagation | default "5s") }}
{{- $grace := include "tokenwire.seconds" ($drain.grace | default "120s") }}
{{- ceil (addf $propagation $grace .Values.terminationMarginSeconds) | int }}
{{- end }}

{{- /* Of `config` what a gateway that runs does not take, settings.RELOADED the other way round: only
then are pods replaced. `open`: to serve everyone takes a restart, too. */ -}}
{{- define "tokenwire.restarting" -}}
{{- $config := include "tokenwire.config" . | fromJson }}
{{- $rest := omit $config "callers" "timeouts" "drain" "retries" "key_file_interval" "upstreams" "models" }}
{{- $limits := omit ($config.limits | default dict) "in_flight" "loop_lag" "queue" "batch_items_at_once" "tokenizer_bytes" "upstream_answer_bytes" "upstream_event_bytes" }}
{{- $log := omit ($config.log | default dict) "level" }}
{{- merge (dict "limits" $limits "log" $log "open" (empty $config.callers)) (omit $rest "limits" "log") | toJson }}
{{- end }}

{{- /* Where probes ask. Kubernetes' can speak no TLS. */ -}}
{{- define "tokenwire.probedPort" -}}
{{- $own := include "tokenwire.opened" (list . "health") }}
{{- if and (not $own) (include "tokenwire.config" . | fromJson).tls }}
{{- fail "config: with tls it needs health: {listen: \"0.0.0.0:50054\"} too, as Kubernetes' probes speak no TLS" }}
{{- end }}
{{- $own | default (toString .Values.port) }}
{{- end }}

{{- /* A list: the root, the name of the probe. */ -}}
{{- define "tokenwire.probe" -}}
{{- $root := first . }}
{{- $values := $root.Values }}
{{- with get $values.probes (last .) -}}
grpc: {port: {{ include "tokenwire.probedPort" $root }}, service: {{ .service | quote }}}
periodSeconds: {{ .periodSeconds }}
failureThreshold: {{ .failureThreshold }}
timeoutSeconds: {{ $values.probes.timeoutSeconds }}
{{- end }}
{{- end }}
