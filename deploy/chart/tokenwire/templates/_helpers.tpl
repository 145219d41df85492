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

{{- /* From SIGTERM to the kill: what the gateway takes to drain, and the margin. 5s and 120s are what
the gateway takes where its file does not say. */ -}}
{{- define "tokenwire.terminationSeconds" -}}
{{- $config := fromYaml .Values.config }}
{{- with $config.Error }}{{ fail (printf "config: not YAML: %s" .) }}{{ end }}
{{- $drain := $config.drain | default dict }}
{{- $propagation := include "tokenwire.seconds" ($drain.propagation | default "5s") }}
{{- $grace := include "tokenwire.seconds" ($drain.grace | default "120s") }}
{{- ceil (addf $propagation $grace .Values.terminationMarginSeconds) | int }}
{{- end }}

{{- /* A list: the values, the name of the probe. */ -}}
{{- define "tokenwire.probe" -}}
{{- $values := first . }}
{{- with get $values.probes (last .) -}}
grpc: {port: {{ $values.port }}, service: {{ .service | quote }}}
periodSeconds: {{ .periodSeconds }}
failureThreshold: {{ .failureThreshold }}
timeoutSeconds: {{ $values.probes.timeoutSeconds }}
{{- end }}
{{- end }}
