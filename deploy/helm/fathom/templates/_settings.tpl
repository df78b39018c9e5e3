{{- /* `settings`, with what follows from other values, as JSON. */}}
{{- define "fathom.settings" -}}
{{- $made := dict "device" (ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0)) "log_format" "json" }}
{{- if .Values.persistence.adapters.enabled }}
{{- $_ := set $made "adapter_root" (include "fathom.mountPath" "adapters") }}
{{- end }}
{{- if .Values.persistence.data.enabled }}
{{- $_ := set $made "data_root" (include "fathom.mountPath" "data") }}
{{- end }}
{{- merge (deepCopy .Values.settings) $made | toJson }}
{{- end }}

{{- /* As TOML. Its strings, numbers, booleans and arrays are written as JSON writes them; its tables are not.
       The image's own variables say host and port and go before a file, so they are variables here too. */}}
{{- define "fathom.toml" -}}
{{- range $name, $value := omit (include "fathom.settings" . | fromJson) "host" "port" }}
{{- if kindIs "map" $value }}
{{- $items := list }}
{{- range $key, $path := $value }}
{{- $items = append $items (printf "%s = %s" (toJson $key) (toJson $path)) }}
{{- end }}
{{ $name }} = { {{- $items | join ", " -}} }
{{- else }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}
