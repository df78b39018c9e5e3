{{- /* Where claims are mounted; `settings` follows them, and the image's own variables say /state. */}}
{{- define "fathom.mountPath" -}}
/{{ . }}
{{- end }}

{{- define "fathom.claimName" -}}
{{- $claim := index .root.Values.persistence .name }}
{{- $claim.existingClaim | default (printf "%s-%s" (include "fathom.fullname" .root) .name) }}
{{- end }}

{{- /* Claims that one node alone can mount, by name, with commas. */}}
{{- define "fathom.claimsOfOneNode" -}}
{{- $names := list }}
{{- range $name, $claim := .Values.persistence }}
{{- if $claim.enabled }}
{{- if not (or (has "ReadWriteMany" $claim.accessModes) (has "ReadOnlyMany" $claim.accessModes)) }}
{{- $names = append $names $name }}
{{- end }}
{{- end }}
{{- end }}
{{- $names | join ", " }}
{{- end }}
