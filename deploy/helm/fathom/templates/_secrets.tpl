{{- /* One of `secrets`: whether it is there ("true" or nothing), and which entry of which Secret it is. */}}
{{- define "fathom.secret.entries" -}}
apiKey: api-key
adminKey: admin-key
keysFile: keys.json
database: database
databasePassword: database-password
huggingFaceToken: hugging-face-token
{{- end }}

{{- define "fathom.secret.isGiven" -}}
{{- $secret := index .root.Values.secrets .name }}
{{- if or $secret.value $secret.existingSecret }}true{{ end }}
{{- end }}

{{- define "fathom.secret.isKeyMade" -}}
{{- $given := print (include "fathom.secret.isGiven" (dict "root" . "name" "apiKey")) (include "fathom.secret.isGiven" (dict "root" . "name" "keysFile")) }}
{{- if and .Values.secrets.apiKey.generate (not $given) (not .Values.settings.insecure) }}true{{ end }}
{{- end }}

{{- define "fathom.secret.isThere" -}}
{{- if include "fathom.secret.isGiven" . }}true
{{- else if eq .name "apiKey" }}{{ include "fathom.secret.isKeyMade" .root }}
{{- end }}
{{- end }}

{{- define "fathom.secret.ref" -}}
{{- $secret := index .root.Values.secrets .name }}
{{- $entry := index (include "fathom.secret.entries" .root | fromYaml) .name -}}
name: {{ $secret.existingSecret | default (include "fathom.fullname" .root) }}
key: {{ $secret.existingKey | default $entry }}
{{- end }}

{{- /* Whether the server keeps its store in SQLite: "true" or nothing. */}}
{{- define "fathom.secret.isSqlite" -}}
{{- if hasPrefix "sqlite" .Values.secrets.database.value }}true
{{- else if not (include "fathom.secret.isGiven" (dict "root" . "name" "database")) }}
{{- if include "fathom.secret.isGiven" (dict "root" . "name" "adminKey") }}true
{{- else }}{{ include "fathom.secret.isGiven" (dict "root" . "name" "keysFile") }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Whether the chart's own Secret has an entry. */}}
{{- define "fathom.secret.isOwn" -}}
{{- range $name, $secret := .Values.secrets }}{{ if $secret.value }}true{{ end }}{{ end }}
{{- include "fathom.secret.isKeyMade" . }}
{{- end }}
